"""cascade doctor: each planted fault is named with its cure, and a healthy recipe has none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from doctor_cases import PLANTED, Planted, copy_of, make_healthy

from cascade.cli import main
from cascade.doctor.command import Options, examine
from cascade.doctor.findings import Finding

QUICK = Options(quick=True)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("healthy")
    make_healthy(folder)
    return folder


def wrong(findings: list[Finding]) -> list[Finding]:
    """What is not ok, in order."""
    return [finding for finding in findings if finding.level != "ok"]


def test_nothing_is_wrong_with_a_healthy_recipe(healthy: Path) -> None:
    findings = examine(healthy / "recipe.yaml", QUICK)
    assert wrong(findings) == []
    groups = {finding.group for finding in findings}
    assert groups == {"environment", "recipe", "data", "checkpoint", "memory"}


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.name)
def test_a_planted_fault_is_named_with_its_cure(
    fault: Planted, healthy: Path, tmp_path: Path
) -> None:
    folder = copy_of(healthy, tmp_path)
    fault.plant(folder)
    found = wrong(examine(folder / "recipe.yaml", QUICK))
    assert {finding.code: finding.level for finding in found} == fault.codes
    assert fault.found in found[0].found
    assert fault.cure in found[0].cure


def test_the_command_tells_and_writes(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "found.json"
    main(["doctor", str(healthy / "recipe.yaml"), "--quick", "--json", str(file)])
    written = json.loads(file.read_text())
    assert (written["level"], written["error"], written["warning"]) == ("ok", 0, 0)
    assert f"0 error(s), 0 warning(s), {written['ok']} ok" in capsys.readouterr().out


def test_exit_codes(healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(healthy, tmp_path)
    PLANTED[0].plant(folder)
    with pytest.raises(SystemExit) as errors:
        main(["doctor", str(folder / "recipe.yaml"), "--quick"])
    assert errors.value.code == 1
    assert "cure: stages.pairs.sample: {max-tiles: 2}" in capsys.readouterr().out
    (folder / "recipe.yaml").write_text("stages: {sft: {kind: sfd}}\n")
    with pytest.raises(SystemExit) as unusable:
        main(["doctor", str(folder / "recipe.yaml"), "--quick"])
    assert unusable.value.code == 2
