"use strict";
// Filters show and hide rows; what is marked to be taken back is saved as JSON lines of keys.
(() => {
  const form = document.querySelector("form");
  const shown = document.querySelector("output");
  const save = document.querySelector("#save");
  const cards = [...document.querySelectorAll("article.card")];
  const texts = new Map();
  let current = -1;
  let unsaved = false;
  document.documentElement.classList.add("js");

  const box = (card) => card.querySelector(".take input");
  const plain = (text) => text.toLowerCase().replace(/\s+/g, " ").trim();
  const textOf = (card) => {
    if (!texts.has(card)) {
      texts.set(card, plain([...card.querySelectorAll(".t")].map((part) => part.textContent).join("\n")));
    }
    return texts.get(card);
  };
  const value = (name) => (form.elements[name] ? form.elements[name].value : "");
  const passes = (card) =>
    (!value("rule") || card.dataset.rules.split(" ").includes(value("rule"))) &&
    (!value("set") || card.dataset.set === value("set")) &&
    (!value("taken") || box(card).checked === (value("taken") === "yes")) &&
    (!value("search") || textOf(card).includes(plain(value("search"))));
  const apply = () => {
    let number = 0;
    for (const card of cards) {
      card.hidden = !passes(card);
      number += !card.hidden;
    }
    shown.textContent = `${number} of ${cards.length}`;
    document.querySelector(".empty").hidden = number > 0;
    mark(-1);
  };
  const taken = () => cards.filter((card) => box(card).checked);
  const count = () => {
    for (const card of cards) card.classList.toggle("taken", box(card).checked);
    const number = taken().length;
    save.textContent = `Save ${number} row${number === 1 ? "" : "s"} taken back`;
    save.disabled = number === 0;
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

  for (const card of cards) {
    box(card).checked = false; // a browser may remember it from another visit
    box(card).addEventListener("change", () => { unsaved = true; count(); });
    for (const text of card.querySelectorAll(".turn .t")) {
      const first = text.querySelector("mark");
      // only where it is out of sight: a text that is cut at its top reads as broken
      if (first && first.offsetTop > text.clientHeight - 40) text.scrollTop = first.offsetTop - 40;
    }
  }
  save.addEventListener("click", () => {
    const lines = taken().map((card) => JSON.stringify({ key: card.dataset.key }) + "\n");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
    link.download = "accepted.jsonl";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    unsaved = false;
  });
  let timer = 0;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(apply, 120); });
  addEventListener("beforeunload", (event) => { if (unsaved) event.preventDefault(); });
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.closest("input[type=search], select")) {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.key === "j") go(1);
    else if (event.key === "k") go(-1);
    else if (event.key === "x" && current >= 0) box(cards[current]).click();
    else if (event.key === "/") form.elements.search.focus();
    else return;
    event.preventDefault();
  });
  count();
})();
