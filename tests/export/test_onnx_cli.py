from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from conftest import tiny_unet
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from diffprune_plugin.cli import run_app
from diffprune_plugin.errors import BadInput, CheckFailed, DiffPruneError, HardwareUnproved
from diffprune_plugin.export import baseline, check_files, cli, integrity, verdict, workflow
from diffprune_plugin.export.benchmark import Latency, Row
from diffprune_plugin.utils import files


def exit_code(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    return int(stop.value.code or 0)


def test_without_arguments_the_last_pruned_model_is_exported_verified_and_timed(
    models, opened, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models.pruned, "diffprune-demo/pruned")
    words = ("model.onnx", "--rounds", 5, "--torch", "--check-placement", "cuda", "--markdown", "latency.md")
    assert exit_code(*words, "--report", "report.html") == 0
    printed = capsys.readouterr().out
    assert "model: diffprune-demo/pruned (no --model given)" in printed
    assert "verified against PyTorch on cpu" in printed
    assert "cuda: 0 nodes without a kernel" in printed
    assert "| eager pruned / pruned |" in Path("latency.md").read_text()
    verdict = json.loads(Path("model.onnx.verdict.json").read_text())
    assert verdict["passed"]
    assert verdict["verify"]["passed"]
    assert verdict["latency"]["ratios"][0]["macs_ratio"] > 1.2
    page = opened(Path("report.html"))
    assert "<h1>model.onnx: passed</h1>" in page
    assert f"<td>{verdict['verify']['worst']['relative']:.1e}</td>" in page
    assert page.count("<td>batch 1, timestep 0</td>") == 1
    assert verdict["latency"]["placements"]["pruned, batch 1"]["proofs"][0]["seen"] in page
    for ratio in verdict["latency"]["ratios"]:
        assert f"<td>{ratio['median']:.3f}x</td>" in page
    # The same input gives the same bytes, in whichever directory.
    assert Path("model.onnx").read_bytes() == models.pruned_onnx.read_bytes()
    check_files("model.onnx")


def test_the_newest_of_the_default_models_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="no --model given and no pruned or diffprune-demo/pruned here"):
        workflow.default_model()
    for age, name in enumerate(("pruned", "diffprune-demo/pruned")):
        Path(name).mkdir(parents=True)
        os.utime(name, (1000 - age, 1000 - age))
    assert workflow.default_model() == Path("pruned")
    os.utime("diffprune-demo/pruned", (2000, 2000))
    assert workflow.default_model() == Path("diffprune-demo/pruned")


@pytest.fixture
def exported(models, monkeypatch):
    """The export itself replaced by a copy of the file that is there, to test what follows it."""

    def copy_instead(model: object, path: Path, **options: object) -> object:
        from diffprune_plugin.export.convert import ExportReport

        files: integrity.Files = {}
        with integrity.new_model(path, options["overwrite"], written=files) as temporary:
            shutil.copy(models.pruned_onnx, temporary)
            copy_instead.meanwhile()
        return ExportReport(path, files, 1, 0.0, integrity.read_provenance(path))

    copy_instead.meanwhile = lambda: None  # what happens between the writing and the renaming
    monkeypatch.setattr(workflow, "to_onnx", copy_instead)
    monkeypatch.setattr(baseline, "dense_twin", lambda unet: None)
    return models.pruned


def test_a_miss_exits_with_1_renames_the_file_and_names_the_case(models, exported, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    shutil.copytree(models.dense, other)  # the file is the pruned model's
    assert exit_code(tmp_path / "m.onnx", "--model", other, "--no-bench") == 1
    error = capsys.readouterr().err
    assert "does not compute what" in error
    assert "batch 1, timestep 0: error" in error
    assert sorted(path.name for path in tmp_path.glob("m.onnx*")) == [
        "m.onnx.manifest.json.rejected",
        "m.onnx.rejected",
        "m.onnx.verdict.json",
    ]
    assert not json.loads((tmp_path / "m.onnx.verdict.json").read_text())["passed"]


def test_a_gate_that_misses_exits_with_1_after_the_tables(exported, tmp_path, capsys):
    words = (
        "--model",
        exported,
        "--rounds",
        5,
        "--no-verify",
        "--max-latency-ms",
        "0.0001",
        "--json",
        tmp_path / "v.json",
    )
    assert exit_code(tmp_path / "m.onnx", *words) == 1
    printed = capsys.readouterr()
    assert "NOT verified (--no-verify)" in printed.out
    assert "all 5 proofs held for 2 of 2 sessions" in " ".join(printed.out.split())
    assert "--max-latency-ms 0.0001: batch 1 takes" in printed.err
    verdict = json.loads((tmp_path / "v.json").read_text())
    assert verdict["verify"] == "left out (--no-verify)"
    assert verdict["failure"].startswith("--max-latency-ms")


def test_fp16_without_a_gpu_is_checked_but_not_timed_and_a_gate_cannot_hold(exported, tmp_path):
    options = workflow.Options(dtype="fp16", verify=False)
    assert workflow.run(exported, tmp_path / "m.onnx", options).latency is None
    verdict = json.loads((tmp_path / "m.onnx.verdict.json").read_text())
    assert verdict["latency"] == "none: no provider computes fp16 and is proved"
    assert "cpu: computes fp16 in fp32" in verdict["providers_refused"]["all"]
    options = workflow.Options(dtype="fp16", verify=False, max_latency_ms=1e9, overwrite=True)
    with pytest.raises(HardwareUnproved, match="--max-latency-ms: latency none"):
        workflow.run(exported, tmp_path / "m.onnx", options)


def test_a_provider_asked_for_is_proved_without_timing_too(exported, tmp_path, monkeypatch):
    options = workflow.Options(provider="cpu", latency=False, verify=False)
    placement = workflow.run(exported, tmp_path / "m.onnx", options).content["placement"]
    assert (placement["provider"], placement["proved"], len(placement["proofs"])) == ("cpu", True, 5)

    def unproved(*_: object) -> None:
        raise HardwareUnproved("cpu is not proved")

    monkeypatch.setattr(workflow, "prove", unproved)
    words = ("--model", exported, "--provider", "cpu", "--no-bench", "--overwrite")
    assert exit_code(tmp_path / "m.onnx", *words) == 3


def test_while_nothing_is_proved_yet_the_verdict_says_so(exported, tmp_path, monkeypatch):
    """Also where an older one had passed: a kill leaves the new file with this one."""
    verdict, seen = tmp_path / "m.onnx.verdict.json", []
    verdict.write_text('{"passed": true}')
    monkeypatch.setattr(workflow, "prove_all", lambda *_: seen.append(json.loads(verdict.read_text())))
    workflow.run(exported, tmp_path / "m.onnx", workflow.Options())
    assert (seen[0]["passed"], seen[0]["failure"]) == (False, "interrupted before all of it was proved")


def verdict_is_of_the_file(path: Path) -> bool:
    verdict = json.loads(path.with_name(path.name + integrity.VERDICT).read_text())
    check_files(path)
    return verdict["passed"] and verdict["export"]["files"] == integrity.read_manifest(path)["files"]


def test_of_two_exports_at_once_the_second_to_end_is_refused_with_all_that_is_its(exported, tmp_path, monkeypatch):
    output, quick = tmp_path / "m.onnx", workflow.Options(latency=False, verify=False)

    def other() -> None:
        monkeypatch.setattr(workflow.to_onnx, "meanwhile", lambda: None)
        workflow.run(exported, output, quick)
        monkeypatch.setattr(workflow, "prove_all", None)  # the second never gets there

    monkeypatch.setattr(workflow.to_onnx, "meanwhile", other)
    with pytest.raises(BadInput, match=r"m\.onnx exists; use --overwrite"):
        workflow.run(exported, output, quick)
    assert verdict_is_of_the_file(output)


@pytest.mark.parametrize("misses", [False, True])
def test_an_export_that_another_overwrites_before_it_is_proved_fails_and_leaves_the_other_alone(
    misses, models, exported, tmp_path, monkeypatch
):
    output, quick = tmp_path / "m.onnx", workflow.Options(latency=False, verify=False)

    def replaced(of_it: verdict.Verdict, *_: object) -> None:
        with integrity.new_model(output, overwrite=True) as temporary:
            shutil.copy(models.dense_onnx, temporary)
        files = integrity.read_manifest(output)["files"]
        verdict.write_verdict(
            output.with_name("m.onnx.verdict.json"), output, {"export": {"files": files}, "passed": True}
        )
        if misses:
            integrity.reject(output, of_it.content["export"]["files"])

    monkeypatch.setattr(workflow, "prove_all", replaced)
    with pytest.raises(CheckFailed, match=r"m\.onnx: another export has written there before this one was proved"):
        workflow.run(exported, output, quick)
    assert output.read_bytes() == models.dense_onnx.read_bytes()
    assert verdict_is_of_the_file(output)


def test_no_path_of_the_machine_is_left_in_the_verdict(models, exported, tmp_path):
    """Of an export that passed, and of one whose error names its files."""
    workflow.run(exported, tmp_path / "m.onnx", workflow.Options(latency=False, verify=False))
    with pytest.raises(DiffPruneError, match=str(tmp_path)):
        workflow.run(models.dense, tmp_path / "m.onnx", workflow.Options(latency=False, overwrite=True))
    for path in tmp_path.glob("*.json*"):
        text = path.read_text()
        assert str(tmp_path) not in text
        assert str(models.dense.parent) not in text
    verdict = json.loads((tmp_path / "m.onnx.verdict.json").read_text())
    assert verdict["failure"].startswith("m.onnx does not compute what dense does")


def test_cuda_without_a_gpu_exits_with_3_before_any_work(models, tmp_path, capsys):
    assert exit_code(tmp_path / "m.onnx", "--model", models.pruned, "--provider", "cuda") == 3
    assert "cuda is not proved: device:" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m.pt"], "must end in .onnx"),
        (["m.onnx", "--model", "nowhere"], "nowhere: no such directory"),
        (["m.onnx", "--provider", "gpu"], "--provider 'gpu'; did you mean 'cpu'?"),
        (["m.onnx", "--provider", "cpu", "--dtype", "fp16"], "no fp16 figure"),
        (["m.onnx", "--dtype", "int8"], "--dtype 'int8'"),
        (["m.onnx", "--opset", "9"], "--opset 9"),
        (["m.onnx", "--batch", "0"], "--batch '0': give whole numbers of at least 1"),
        (["m.onnx", "--batch", "many"], "--batch 'many'"),
        (["m.onnx", "--check-placement", "rocm"], "there is a table for cuda only"),
        (["m.onnx", "--no-bench", "--min-speedup", "2"], "--min-speedup: made of the latency that --no-bench leaves"),
        (["m.onnx", "--no-bench", "--tune", "--provider", "cuda"], "--tune: made of the latency that --no-bench"),
        (["m.onnx", "--no-bench", "--markdown", "l.md", "--plot", "l.png"], "--markdown, --plot: made of the latency"),
        (["m.onnx", "--no-bench", "--torch"], "--torch: made of the latency"),
        (["m", "--no-bench", "--markdown", "l.md"], "--markdown: made of the latency"),
        (["m.onnx", "--min-speedup", "nan"], "--min-speedup nan: give a number above 0"),
        (["m.onnx", "--baseline", "nowhere"], "--baseline nowhere: no such directory"),
        (["m.onnx", "--markdown", "there.onnx/l.md"], "there.onnx is not a directory that can be written to"),
        (["there.onnx"], "exists; use --overwrite"),
        (["m.onnx", "--json", "there.onnx"], "exists; use --overwrite"),
    ],
)
def test_bad_input_exits_with_2_in_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.onnx").touch()
    (tmp_path / "pruned").mkdir()
    assert exit_code(*words) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.count("\n") == 0
    assert "Traceback" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned", "there.onnx"]


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("", {}),
        ("--no-verify --no-bench --torch --overwrite", {"verify": False, "latency": False, "torch": True}),
        ("--dynamic batch,height --batch 1,4 --opset 18", {"dynamic": ("batch", "height"), "batches": (1, 4)}),
        ("--json v.json --plot l.png --rounds 7 --min-speedup 1.5", {"verdict": Path("v.json"), "rounds": 7}),
    ],
)
def test_what_is_not_given_is_as_options_has_it_and_what_is_given_arrives(words, changes, tmp_path, monkeypatch):
    seen: list[workflow.Options] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workflow, "run", lambda model, output, options, *_: seen.append(options))
    exit_code("m.onnx", "--model", "m", *words.split())
    others = {"--overwrite": ("overwrite", True), "--opset": ("opset", 18), "--plot": ("plot", Path("l.png"))}
    others["--min-speedup"] = ("min_speedup", 1.5)
    further = dict(pair for word, pair in others.items() if word in words)
    assert seen == [workflow.Options(**changes, **further)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--baseline", "wider"], "--baseline wider: the plan was made for another architecture"),
        (["--baseline", "pruned"], "--baseline pruned is pruned already; give the dense model's directory"),
        (["--model", "dense", "--baseline", "larger"], "--baseline larger is not the dense model that this one came"),
        (["--model", "dense", "--min-speedup", "1.1"], "--min-speedup: dense does not say what it was pruned from"),
        (["--baseline", "dense", "--no-bench"], "--baseline: an fp32 file is timed beside it, which --no-bench leaves"),
    ],
)
def test_a_baseline_that_is_not_the_models_own_is_refused_before_any_work(
    models, tmp_path, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(tmp_path)
    for path in (models.dense, models.pruned):
        shutil.copytree(path, path.name)
    for name, change in {"wider": {"block_out_channels": [32, 64]}, "larger": {"sample_size": 32}}.items():
        changed = UNet2DModel.from_config({**tiny_unet().config, **change})
        DDPMPipeline(changed, DDPMScheduler()).save_pretrained(name)
    monkeypatch.setattr(workflow, "to_onnx", pytest.fail)
    assert exit_code("m.onnx", *words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("m.onnx*"))


def test_memory_that_runs_out_is_one_line():
    with pytest.raises(BadInput, match="out of memory; use a smaller --batch"), verdict.memory_errors():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def test_bench_times_two_files(models, tmp_path, capsys):
    app = typer.Typer()
    app.command()(cli.bench)
    words = [
        models.dense_onnx,
        models.pruned_onnx,
        "--rounds",
        5,
        "--json",
        tmp_path / "l.json",
        "--plot",
        tmp_path / "l.png",
    ]
    with pytest.raises(SystemExit) as stop:
        run_app(app, [str(word) for word in words])
    assert not stop.value.code
    assert json.loads((tmp_path / "l.json").read_text())["provider"] == "cpu"
    assert (tmp_path / "l.png").stat().st_size > 1000


@pytest.mark.parametrize("option", ["--json", "--markdown", "--plot"])
def test_bench_refuses_a_directory_as_a_file_before_it_times(option, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workflow, "time_files", pytest.fail)
    app = typer.Typer()
    app.command()(cli.bench)
    with pytest.raises(SystemExit) as stop:
        run_app(app, [str(models.dense_onnx), str(models.pruned_onnx), option, str(tmp_path), "--overwrite"])
    assert stop.value.code == 2
    assert f"{tmp_path} is a directory; choose another path" in capsys.readouterr().err


def test_bench_shows_what_it_found_before_it_writes(models, tmp_path, monkeypatch, capsys):
    """A disk that is full at the end takes the file, not the figures."""

    def full(*_: object) -> None:
        raise BadInput("disk full")

    found = Latency("cpu", "fp32", 1, 5, [Row("cpu", "pruned", 1, 5, 1.25, 1.25, 1.25, 1.25, 3)])
    monkeypatch.setattr(workflow, "time_files", lambda *_: found)
    monkeypatch.setattr(verdict, "write_json", full)
    monkeypatch.setattr(files, "write_text", full)
    app = typer.Typer()
    app.command()(cli.bench)
    for option in ("--json", "--markdown"):
        with pytest.raises(SystemExit) as stop:
            run_app(app, [str(models.dense_onnx), str(models.pruned_onnx), option, str(tmp_path / "l")])
        assert stop.value.code == 2
        assert "1.250" in capsys.readouterr().out


def test_inspect_tells_a_damaged_file_from_a_whole_one(copy, capsys):
    from diffprune_plugin.cli import main

    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(copy)])
    assert not stop.value.code
    assert "undamaged" in capsys.readouterr().out
    content = bytearray(copy.read_bytes())
    content[len(content) // 2] ^= 1
    copy.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(copy), "--json"])
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert json.loads(printed.out)["model_class"] == "UNet2DModel"
    assert "its SHA-256 is not the manifest's: changed since it was written" in printed.err


def test_help_imports_neither_torch_nor_onnx_runtime():
    code = (
        "import sys\n"
        "from diffprune_plugin.export.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'diffusers') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
