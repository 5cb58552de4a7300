"""The demo: its steps in order, its table by value; the whole of it is slow."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from fastcon import demo
from fastcon.cli.main import main


def test_the_story_with_commands_played(tmp_path, monkeypatch):
    ran = []

    def command(args):
        ran.append(args[0])
        context = main.commands[args[0]].make_context(args[0], list(args[1:]))  # its options exist
        if args[0] == "probe":
            base = 0.1 * ran.count("probe")
            return {"results": [{"accuracy": base + 0.01 * k} for k in range(len(context.params["backbones"]))]}
        return {"seconds": 2.0, "step": 10, "rows_computed": 100}

    monkeypatch.setattr(demo, "_render", lambda root: None)
    said: list[str] = []
    result = demo.run(str(tmp_path), command, said.append)
    assert ran == [
        "teach",
        "teach",
        "precompute",
        "verify",
        "train",
        "train",
        "train",
        "probe",
        "probe",
        "probe",
        "probe",
        "report",
    ]
    assert result["accuracy"]["consolidate"] == pytest.approx(
        {"glyphs": 0.14, "shapes": 0.24, "textures": 0.34, "digits": 0.44}
    )
    assert (result["precompute_rows_per_second"], result["train_images_per_second"]) == (50, 160)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert table[-1] == "| consolidate | 14.0 | 24.0 | 34.0 | 44.0 | 34.0 |"
    assert "+4.0 points on the related task and +4.0" in "\n".join(said)
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "probe-shapes.json").read_text())["results"][4]["accuracy"] == pytest.approx(0.24)
    assert json.loads((tmp_path / "result.json").read_text())["accuracy"] == result["accuracy"]


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "demo")])
    assert result.exit_code == 0, result.output
    accuracy = json.loads((tmp_path / "demo" / "result.json").read_text())["accuracy"]
    assert all(0 < value < 1 for row in accuracy.values() for value in row.values())
    assert "consolidated student is" in result.output
    page = (tmp_path / "demo" / "report" / "index.html").read_text()
    for section in ("5-shot linear SVM", "learning curves", "cost and accuracy", "views of"):
        assert f"<h2>{section}" in page
