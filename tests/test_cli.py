"""The command line as a user meets it: help, one session from end to end, and bad input in one clear line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import make_model, rewrite_record

from fastcon.cli.main import main

COMMANDS = [
    "precompute",
    "train",
    "probe",
    "teach",
    "finetune",
    "evaluate",
    "export",
    "study",
    "data",
    "verify",
    "forget",
    "info",
    "report",
    "relate",
    "rank",
    "dedup",
    "bench",
    "demo",
]


def fastcon(*args, code: int = 0):
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refusal(*args, code: int = 1) -> str:
    """The one line that a bad call prints on stderr."""
    result = fastcon(*args, code=code)
    lines = [line for line in result.stderr.splitlines() if line]
    if code == 1:
        errors = [
            line for line in lines if not re.match(r"fastcon: [\d,]+ (images|classes)|fastcon: no generalist", line)
        ]
        assert len(errors) == 1, lines
        assert errors[0].startswith("fastcon: ")
    return lines[-1]


def test_help_is_quick():
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fastcon", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5


def test_help_imports_nothing_heavy():
    script = (
        "import sys, fastcon.cli; print([m for m in ('torch', 'numpy', 'zarr', 'nvidia.dali') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert out.strip() == "[]"


def test_a_look_at_a_store_or_a_run_needs_no_pytorch(session):
    script = (
        "import sys; from fastcon.cli.main import main\n"
        "main(['info', sys.argv[1]], standalone_mode=False); print([m for m in ('torch', 'torchvision') if m in sys.modules])"
    )
    for path in (session / "store", session / "teacher"):
        command = [sys.executable, "-c", script, str(path)]
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.endswith("\n[]\n")


def test_a_reader_that_has_seen_enough_is_no_error(session):
    command = f"{sys.executable} -m fastcon info {session / 'store'} | true"
    assert subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stderr == ""


def test_every_command_is_listed_and_has_a_working_example():
    assert sorted(main.commands) == sorted(COMMANDS)
    for name, command in main.commands.items():
        text = command.help or ""
        examples = [
            line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip().startswith("fastcon")
        ]
        assert examples, name
        for example in examples:
            words = example.split("#")[0].split()[1:]
            context = main.commands[words[0]].make_context(words[0], words[1:])  # raises where an option is none
            assert context.info_name == name


def test_json_everywhere():
    for name in COMMANDS:
        assert any("--json" in param.opts for param in main.commands[name].params), name


@pytest.fixture(scope="module")
def session(tmp_path_factory, labelled_folder, proxy_folder) -> Path:
    """teach → precompute → train, by the commands."""
    root = tmp_path_factory.mktemp("session")
    general = make_model(root / "general.safetensors", [f"thing {k}" for k in range(7)], 5)
    fastcon("teach", "--train", labelled_folder, "--holdout", 0.5, "--split", "t", "--init", general, "--lr-grid", "0.01",
            "--epochs", 2, "--batch-size", 8, "--out", root / "teacher", "--json", root / "teach.json")  # fmt: skip
    fastcon("precompute", proxy_folder, "--store", root / "store", "--views", 2, "--size", 32, "--generalist",
            f"general={general}", "--teacher", f"shapes={root}/teacher", "--json", root / "precompute.json")  # fmt: skip
    fastcon("train", "--store", root / "store", "--out", root / "student", "--epochs", 2, "--json", root / "train.json")
    return root


def test_the_session(session, labelled_folder):
    assert json.loads((session / "precompute.json").read_text())["rows_computed"] == 300
    taught = json.loads((session / "teach.json").read_text())
    assert taught["classes"] == 3
    trained = json.loads((session / "train.json").read_text())
    assert set(trained["heads"]) == {"general", "shapes"}
    result = fastcon(
        "probe", session / "student", session / "teacher", "--train", labelled_folder, "--holdout", 0.5, "--split", "d",
        "--trials", 3, "--json", session / "probe.json",
    )  # fmt: skip
    probed = json.loads((session / "probe.json").read_text())
    assert [len(row["accuracies"]) for row in probed["results"]] == [3, 3]
    assert f"{probed['results'][0]['accuracy']:.2%}" in result.stdout
    assert probed["classes"] == 3
    result = fastcon("evaluate", session / "student", "--head", "shapes", "--test", labelled_folder, "--holdout", 0.5,
                     "--split", "t", "--json", session / "e.json")  # fmt: skip
    assert 0 <= json.loads((session / "e.json").read_text())["accuracy"] <= 1
    alone = fastcon("evaluate", session / "teacher", "--test", labelled_folder, "--holdout", 0.5, "--split", "t")
    assert f"{taught['accuracy']:.2%}" in alone.stdout
    assert "ok      shapes: rows" in fastcon("verify", session / "store", "--rows", 20).stdout
    assert "consolidate" in fastcon("info", session / "student").stdout
    described = fastcon("info", session / "store").stdout
    assert "150 images x 2 views at 32 px" in described
    assert "shapes: 3 classes" in described


def test_running_again_does_nothing(session, proxy_folder):
    again = fastcon("train", "--store", session / "store", "--out", session / "student", "--epochs", 2)
    assert "nothing to do" in again.stderr
    again = fastcon("precompute", proxy_folder, "--store", session / "store", "--views", 2, "--size", 32,
                    "--teacher", f"shapes={session}/teacher")  # fmt: skip
    assert "nothing to do" in again.stdout


def test_dry_runs_write_nothing(session, proxy_folder, tmp_path):
    result = fastcon("precompute", proxy_folder, "--store", tmp_path / "s", "--views", 10, "--size", 32, "--teacher",
                     f"shapes={session}/teacher", "--dry-run", "--json", tmp_path / "cost.json")  # fmt: skip
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert (cost["rows"], cost["bytes"]) == (1500, 1500 * 3 * 2)
    assert cost["seconds"] > 0
    assert "would store" in result.stdout
    fastcon("precompute", proxy_folder, "--store", tmp_path / "s", "--views", 10, "--size", 32, "--bake", "--teacher",
            f"shapes={session}/teacher", "--dry-run", "--json", tmp_path / "baked.json")  # fmt: skip
    a_view = json.loads((tmp_path / "baked.json").read_text())["bytes"] / 1500 - 3 * 2
    assert 1024 < a_view < 4096  # a tar header, and a JPEG of 32 px in blocks of 512
    assert not (tmp_path / "s").exists()
    result = fastcon("train", "--store", session / "store", "--out", tmp_path / "r", "--balance", "1:3", "--dry-run")
    assert "general (weight 0.5), shapes (weight 1.5)" in result.stdout
    weights = ["--weight", "shapes=0.25", "--weight", "general=2", "--dry-run"]
    result = fastcon("train", "--store", session / "store", "--out", tmp_path / "r", *weights)
    assert "general (weight 2), shapes (weight 0.25)" in result.stdout
    assert not (tmp_path / "r").exists()


def test_options_from_a_file_and_flags_win(session, tmp_path):
    (tmp_path / "o.toml").write_text('epochs = 1\nbalance = "1:3"\n')
    for flags, epochs in (([], 1), (["--epochs", 2], 2)):
        out = tmp_path / f"run{epochs}"
        fastcon("train", "--config", tmp_path / "o.toml", "--store", session / "store", "--out", out, *flags)
        config = json.loads((out / "config.json").read_text())
        assert (config["epochs"], config["balance"]) == (epochs, [1.0, 3.0])
    (tmp_path / "o.toml").write_text("epoch = 1\n")
    assert "'epoch' is no option of train" in refusal("train", "--config", tmp_path / "o.toml", code=2)


@pytest.fixture
def folder(proxy_folder, tmp_path) -> Path:
    return Path(shutil.copytree(proxy_folder, tmp_path / "images"))


def precompute_again(session, folder, *extra, name="shapes", model=None, code=1):
    return refusal("precompute", folder, "--store", session / "store", "--views", 2, "--size", 32, "--teacher",
                   f"{name}={model or session / 'teacher'}", *extra, code=code)  # fmt: skip


def test_refused_a_folder_that_changed(session, folder):
    (folder / "000007.jpg").unlink()
    line = precompute_again(session, folder)
    assert "made from 150 images" in line
    assert "'000007.jpg' is gone" in line
    line = refusal("train", "--store", session / "store", "--out", folder / "run", "--images", folder)
    assert "'000007.jpg' is gone" in line


def test_refused_a_store_of_another_format(session, tmp_path):
    path = Path(shutil.copytree(session / "store", tmp_path / "s"))
    rewrite_record(path, lambda record: record.update(format=9))
    assert "store format 9, this fastcon reads format 2" in refusal("info", path)


def test_refused_names_and_weights(session, folder, tmp_path):
    line = refusal("precompute", folder, "--store", tmp_path / "s", "--views", 1, "--teacher", f"a={session}/teacher",
                   "--teacher", f"a={session}/teacher")  # fmt: skip
    assert "'a' is given twice" in line
    other = make_model(tmp_path / "m.safetensors", [f"shape-{k:03d}" for k in range(3)], 6)
    assert "teacher 'shapes' is in" in precompute_again(session, folder, model=other)
    wrong = f"torchvision:resnet18@{session}/teacher/model.safetensors"
    line = precompute_again(session, folder, model=wrong)
    assert "do not fit torchvision:resnet18: missing: " in line


def test_refused_an_unreadable_proxy(session, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"nothing")
    assert "no readable image" in precompute_again(session, tmp_path / "images")


def test_refused_options(session, folder, tmp_path):
    assert "--views" in refusal(
        "precompute", folder, "--store", tmp_path / "s", "--views", 0, "--teacher", "a=b", code=2
    )
    assert "NAME=MODEL" in refusal(
        "precompute", folder, "--store", tmp_path / "s", "--views", 1, "--teacher", "a", code=2
    )
    assert "no teacher given" in refusal("precompute", folder, "--store", tmp_path / "s", "--views", 1, code=2)
    line = refusal("probe", "x", "--train", folder, "--holdout", 0.5, "--c-grid", "1,x", code=2)
    assert "--c-grid '1,x' is not numbers" in line
    assert "--device cuda" in refusal("verify", session / "store", "--device", "cuda")


def test_refused_an_output_folder_that_holds_another_run(session):
    line = refusal("train", "--store", session / "store", "--out", session / "teacher", "--epochs", 2)
    assert "holds another run: command was 'teach', this call says 'train'" in line


def test_refused_one_class_for_a_probe(session, proxy_folder):
    line = refusal("probe", session / "student", "--train", proxy_folder, "--holdout", 0.5)
    assert "holds 0 class(es), at least 2 are needed" in line


def test_refused_a_missing_dependency(proxy_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # what importing it then does: ImportError
    line = refusal(
        "precompute", proxy_folder, "--store", tmp_path / "s", "--views", 1, "--teacher", "a=timm:resnet10t@random"
    )
    assert "pip install 'fastcon[timm]' brings it" in line


def test_refused_what_is_neither_store_nor_run(tmp_path):
    assert "neither a store (no zarr.json) nor a run" in refusal("info", tmp_path)


def test_verify_exits_1_for_a_damaged_store(session, tmp_path):
    path = Path(shutil.copytree(session / "store", tmp_path / "s"))
    (path / "teachers" / "shapes" / "logits" / "c" / "0" / "0" / "0").unlink()
    result = fastcon("verify", path, "--rows", 4, code=1)
    assert "FAILED  shapes: chunks" in result.stdout
    assert "1 of 8 checks failed" in result.stderr
    assert "ok      shapes: chunks" in fastcon("verify", path, "--rows", 4, "--repair").stdout


def test_a_teacher_is_forgotten(session, tmp_path):
    shutil.copytree(session / "store", tmp_path / "s")
    said = fastcon("forget", tmp_path / "s", "shapes", "--json", tmp_path / "f.json").stdout
    assert re.search(r"shapes is gone, [\d.]+ \w+ freed; left: general", said)
    result = json.loads((tmp_path / "f.json").read_text())
    assert result["teachers"] == ["general"]
    assert result["bytes_freed"] > 150 * 2 * 3 * 2
    assert "has no teacher 'shapes': there are general" in refusal("forget", tmp_path / "s", "shapes")


def test_random_weights_are_said(session, folder, tmp_path):
    model = "torchvision:shufflenet_v2_x0_5"
    line = refusal("precompute", folder, "--store", tmp_path / "s", "--views", 1, "--teacher", f"a={model}")
    assert (
        f"{model} names no weights: say {model}@IMAGENET1K_V1, {model}@FILE, or {model}@random for random ones" in line
    )
    assert not (tmp_path / "s").exists()
    assert "names no weights" in refusal(
        "train", "--store", session / "store", "--out", tmp_path / "r", "--student", model
    )
    result = fastcon("precompute", folder, "--store", tmp_path / "s", "--views", 1, "--size", 32, "--teacher",
                     f"a={model}@random?size=32")  # fmt: skip
    assert "a (1000 classes, random weights)" in result.stderr
    assert "shufflenet_v2_x0_5 with random weights" in fastcon("info", tmp_path / "s").stdout


def test_no_space_left_is_one_line(session, folder, tmp_path):
    """A file-size limit stands in for a full disk: the store stays whole, and the same command finishes it."""
    script = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)\n"
        "from fastcon.cli.main import main; main()"
    )
    args = ["precompute", str(folder), "--store", str(tmp_path / "s"), "--views", "1", "--size", "32", "--teacher",
            f"shapes={session}/teacher"]  # fmt: skip
    out = subprocess.run([sys.executable, "-c", script, "4000", *args], capture_output=True, text=True)
    assert out.returncode == 1, out.stderr
    lines = [line for line in out.stderr.splitlines() if line.startswith("fastcon: ") and " images x" not in line]
    assert "File too large" in lines[-1]
    assert "Traceback" not in out.stderr
    out = subprocess.run([sys.executable, "-m", "fastcon", *args], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


def test_refused_a_result_file_without_a_folder(session, tmp_path):
    assert "there is no folder" in refusal("info", session / "store", "--json", tmp_path / "no" / "x.json", code=2)


def test_refused_both_or_neither_test_part(labelled_folder):
    for flags in ([], ["--test", labelled_folder, "--holdout", 0.5]):
        assert "either as --test" in refusal("probe", "x", "--train", labelled_folder, *flags, code=2)


def test_a_finished_run_still_reports(session, tmp_path):
    fastcon(
        "train", "--store", session / "store", "--out", session / "student", "--epochs", 2, "--json", tmp_path / "j"
    )
    assert (
        json.loads((tmp_path / "j").read_text())["heads"] == json.loads((session / "train.json").read_text())["heads"]
    )


def test_the_demo_stops_where_a_command_fails(tmp_path, monkeypatch):
    from fastcon import demo

    monkeypatch.setattr(demo, "_render", lambda root: (root / "broad").mkdir(parents=True))
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "d")])
    assert result.exit_code == 1
    assert "no images in" in result.stderr


def test_bench_writes_a_list_of_rows_and_a_record(tmp_path, monkeypatch):
    from fastcon import bench
    from fastcon.bench import kernel

    rows = [bench.compared("loss_vs_eager", [1.0], [2.0], "us", "cpu", case="B = 1")]
    monkeypatch.setattr(kernel, "bench", lambda say, device: rows)
    monkeypatch.setattr(bench, "results_folder", lambda: tmp_path / "results")
    result = CliRunner().invoke(main, ["bench", "kernel", "--json", str(tmp_path / "rows.json")])
    assert result.exit_code == 0, result.output
    assert "loss_vs_eager (B = 1): 1 against 2 us, ratio 2.00" in result.output
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    record = json.loads((tmp_path / "results" / "kernel-cpu.json").read_text())
    assert set(record) == {"command", "commit", "hardware", "versions", "rows"}
    assert record["rows"] == rows


def test_a_store_in_bytes_with_baked_views_from_the_command_line(tmp_path, proxy_folder, generalist_file):
    store, out = tmp_path / "store", tmp_path / "run"
    made = CliRunner().invoke(
        main,
        ["precompute", str(proxy_folder), "--store", str(store), "--views", "1", "--size", "32", "--logits", "uint8",
         "--generalist", f"general={generalist_file}", "--bake", "--bake-quality", "80"],
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    trained = CliRunner().invoke(
        main, ["train", "--store", str(store), "--method", "soft-label", "--epochs", "1", "--out", str(out)]
    )
    assert trained.exit_code == 0, trained.output
    shown = CliRunner().invoke(main, ["info", str(store)]).output
    assert "JPEG quality 80, 100% done" in shown
    assert "uint8 logits" in shown
    assert "  time: " in CliRunner().invoke(main, ["info", str(out)]).output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "kernel", "--images", "x"], "--images is for loader, train, probe, not for bench kernel"),
        (
            ["bench", "store", "--device", "cpu"],
            "--device is for kernel, loader, train, probe, probe_full, start, not for bench store",
        ),
        (["precompute", "x", "--store", "s", "--views", "1", "--teacher", "a=b", "--bake-quality", "9"], "give --bake"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(arguments, message):
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert message in result.output


def test_features_of_the_images_that_draws_touch_are_enough(tmp_path, labelled_folder, teacher_file, monkeypatch):
    """Of a large set a probe computes no more; the accuracies are the same."""
    from fastcon.transfer import probe as stage

    sizes = []
    real = stage.features

    def spy(model, manifest, *rest):
        sizes.append(len(manifest))
        return real(model, manifest, *rest)

    monkeypatch.setattr(stage, "features", spy)
    found = []
    for few in (10, 0):
        monkeypatch.setattr(stage.defaults, "FEW", few)
        fastcon("probe", teacher_file, "--train", labelled_folder, "--holdout", 0.5, "--split", "d", "--shots", 2,
                "--trials", 2, "--folds", 2, "--json", tmp_path / "probe.json")  # fmt: skip
        found.append(json.loads((tmp_path / "probe.json").read_text()))
    assert sizes[:2] == [84, 84]
    assert all(size < 25 for size in sizes[2:])
    assert found[0]["results"][0]["accuracies"] == pytest.approx(found[1]["results"][0]["accuracies"])
    assert found[0]["train_images"] == found[1]["train_images"] == 21


def test_the_data_sets_are_listed_with_where_to_get_them():
    text = fastcon("data", "list").output
    assert "cub: CUB-200-2011 birds; 200 classes; images: train 5,994, test 5,794" in text
    assert "from  github.com/karansikka1/iFood_2019" in text


def test_a_copy_of_a_data_set_is_checked(tmp_path, labelled_folder):
    (tmp_path / "NWPU-RESISC45").symlink_to(labelled_folder)
    refused = fastcon("data", "check", "resisc45", tmp_path, code=1).output
    assert "all: 84 of 31,500 images; " in refused
    assert refused.strip().splitlines()[-1].endswith(f"{tmp_path} is no whole copy of resisc45")
    assert "takes the NAME of a data set and the folder" in refusal("data", "check", "resisc45", code=2)
    assert "no data set 'cars': there are cars196" in refusal("data", "check", "cars", tmp_path)


def test_a_study_says_what_it_lacks(tmp_path):
    assert "needs --out FOLDER" in refusal("study", "table4", code=2)
    assert "needs the data set data:cars196: give its folder with --data" in refusal(
        "study", "fig5a", "--out", tmp_path / "x", code=2
    )
    assert not (tmp_path / "x").exists()
    assert "table4" in fastcon("study").output
    (tmp_path / "bad.toml").write_text('generalist = "g"\n[models.g]\nmodel = "torchvision:resnet18"\n[options]\n'
                                       'probe = { trails = 3 }\n[data.x]\ntrain = "y"\nholdout = 0.5\n'
                                       '[[evaluations]]\ncommand = "probe"\non = "x"\nof = "generalist"\n')  # fmt: skip
    assert "--trails" in fastcon("study", tmp_path / "bad.toml", "--dry-run", code=2).output


@pytest.mark.parametrize("number", ["0", "1"])
def test_other_commands_run_in_one_process(monkeypatch, number):
    """What is said of it is said by the first rank alone."""
    monkeypatch.setenv("RANK", number)
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = CliRunner().invoke(main, ["info", "x"])
    text = "fastcon: info runs in one process: start it without torchrun\n"
    assert (told.exit_code, told.output) == ((2, text) if number == "0" else (1, ""))
