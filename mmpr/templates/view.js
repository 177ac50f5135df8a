"use strict";
// Filters live in the address: #set=charts&kind=format&only=few&search=red is a link to that view.
(() => {
  const form = document.querySelector("form");
  const shown = document.querySelector("output");
  const cards = [...document.querySelectorAll("article.card")];
  const fields = ["set", "kind", "only", "search"].filter((name) => form.elements[name]);
  const texts = new Map();
  let current = -1;
  document.documentElement.classList.add("js");

  const plain = (text) => text.toLowerCase().replace(/\s+/g, " ").trim();
  const textOf = (card) => {
    if (!texts.has(card)) {
      const parts = [...card.querySelectorAll(".t")].map((part) => part.textContent);
      texts.set(card, plain(parts.join("\n")));
    }
    return texts.get(card);
  };
  const passes = (card, wanted) =>
    (!wanted.set || card.dataset.set === wanted.set) &&
    (!wanted.kind || JSON.parse(card.dataset.kinds).includes(wanted.kind)) &&
    (!wanted.only || JSON.parse(card.dataset.only).includes(wanted.only)) &&
    (!wanted.search || textOf(card).includes(plain(wanted.search)));

  const apply = (wanted) => {
    let number = 0;
    for (const card of cards) {
      card.hidden = !passes(card, wanted);
      number += !card.hidden;
    }
    shown.textContent = `${number} of ${cards.length}`;
    document.querySelector(".empty").hidden = number > 0;
    mark(-1);
  };
  const fromForm = () => Object.fromEntries(fields.map((name) => [name, form.elements[name].value]));
  const fromAddress = () => {
    const given = new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : "");
    const wanted = Object.fromEntries(fields.map((name) => [name, given.get(name) || ""]));
    for (const name of fields) form.elements[name].value = wanted[name];
    apply(wanted); // a value that no record has shows none of them, and says so
  };
  const toAddress = (wanted) => {
    const given = new URLSearchParams(Object.entries(wanted).filter((pair) => pair[1]));
    history.replaceState(null, "", given.size ? `#${given}` : location.pathname);
  };
  const changed = () => {
    const wanted = fromForm();
    apply(wanted);
    toAddress(wanted);
  };
  const mark = (place) => {
    if (current >= 0) cards[current].classList.remove("current");
    current = place;
    if (place < 0) return;
    cards[place].classList.add("current");
    cards[place].scrollIntoView({ block: "start" });
  };
  const go = (step) => {
    let place = current;
    do place += step; while (cards[place] && cards[place].hidden);
    if (cards[place]) mark(place);
  };

  let timer = 0;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(changed, 120); });
  form.addEventListener("reset", () => setTimeout(changed));
  document.querySelector("#whole").addEventListener("change", (event) => {
    document.body.classList.toggle("whole", event.target.checked);
  });
  addEventListener("hashchange", fromAddress);
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.closest("input, select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "j") go(1);
    else if (event.key === "k") go(-1);
    else if (event.key === "/") form.elements.search.focus();
    else return;
    event.preventDefault();
  });
  fromAddress();
})();
