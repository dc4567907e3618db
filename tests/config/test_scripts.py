"""The authors' commands as they stand in their scripts."""

from __future__ import annotations

import json

import pytest

from diffprune_plugin.config.dialects import read
from diffprune_plugin.config.dialects.shell import commands
from diffprune_plugin.errors import BadInput

FLAGS = ["--dataset cifar10", "--model_path m", "--pruning_ratio 0.4", "--pruner diff-pruning", "--thr 0.05"]
LINES = " \\\n".join(FLAGS)
EXP = '--config "x.yml" --ni --pruning_ratio "0.4" --pruner "ours" --taylor_batch_size "64"'


@pytest.mark.parametrize("file", [True, False], ids=["a file", "--from-flags"])
@pytest.mark.parametrize(
    "text",
    [
        LINES,
        LINES + " \\",
        LINES + " \\\n\n",
        LINES.replace("\n", "\r\n") + " \\\r\n",
        LINES.replace("\\\n", "\\  \n"),
        LINES.replace("\\\n", "\n"),
        "python ddpm_prune.py \\\n" + LINES + " \\",
        "#!/bin/bash\n\n# Prune it\nset -e\npython ddpm_prune.py \\\n" + LINES,
        f"CUDA_VISIBLE_DEVICES=0 python3 -u ./ddpm_prune.py {' '.join(FLAGS)} > log.txt 2>&1 &\nwait",
        f"cd repo && python ddpm_prune.py {' '.join(FLAGS)} | tee log; python ddpm_train.py --pruner x\n",
        f"nohup python -m tools.ddpm_prune {' '.join(FLAGS)} > log.txt &",
        f"mkdir -p run\npython -m torch.distributed.run ddpm_prune.py {' '.join(FLAGS)}",
        f"accelerate launch --num_processes 2 ddpm_prune.py {' '.join(FLAGS)}  # as in the paper",
        f"export A=1\npython ddpm_prune.py\n{LINES}\npython main.py -t --gpus 0,1 --load_pruned_model a.pt",
    ],
)
def test_a_command_is_taken_as_it_stands_in_a_script(text, file, run, tmp_path) -> None:
    path = tmp_path / "flags.txt"
    path.write_text(text)
    code, out, err = run("config", *([path] if file else ["--from-flags", text]), "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["native"] == {
        "importance": {"name": "diff_taylor", "preset": "diffusers", "threshold": 0.05},
        "pruning_ratio": 0.4,
        "batch_size": 128,
        "data": "cifar10",
        "model": "m",
    }


@pytest.mark.parametrize(
    ("text", "dialect", "expected"),
    [
        (f"python prune.py {EXP}", "ddpm_exp", {"pruning_ratio": 0.4, "batch_size": 64}),
        ("python prune.py --pruning_ratio 0.4", "ddpm_exp", {"batch_size": 128}),
        ("python prune_ldm.py --sparsity 0.3 --pruner magnitude", "ldm_exp", {"pruning_ratio": 0.3}),
        ("python ldm_prune.py --model_path m", "ldm_prune", {"importance": {"name": "random"}}),
        ("python mine.py --pruner ours --pruning_ratio 0.3", "ddpm_exp", {"pruning_ratio": 0.3}),
    ],
)
def test_the_scripts_name_says_whose_defaults_are_meant(text, dialect, expected) -> None:
    listing = read(None, text)
    assert listing.dialect == f"Diff-Pruning flags ({dialect})"
    listing.check()
    assert listing.values.items() >= expected.items()


def test_what_stands_around_the_command_is_listed(run) -> None:
    text = "set -e\nCUDA_VISIBLE_DEVICES=0 python prune_ldm.py --sparsity 0.3\npython main.py -t"
    code, out, _ = run("config", "--from-flags", text, "--json")
    assert code == 0
    verdicts = {row["key"]: row["verdict"] for row in json.loads(out)["keys"]}
    for key in ("set -e", "CUDA_VISIBLE_DEVICES=0 python prune_ldm.py", "python main.py -t"):
        assert verdicts[key] == "ignored"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("python ddpm_prune.py --pruning_ratio $1", "--pruning_ratio: '$1': is for the shell to fill in"),
        ("for r in 0.1 0.3; do python ddpm_prune.py --pruning_ratio $r; done", "'$r': is for the shell to fill in"),
        ('python ddpm_prune.py --model_path "${HOME}/m"', "--model_path: '${HOME}/m': is for the shell"),
        ("python prune.py --thr 0.1\npython ddpm_prune.py --thr 0.1", "may each be what prunes; keep one"),
        ("set -e\necho --thr 0.1", "holds no command with flags"),
        ("python ddpm_prune.py cifar10", "'cifar10' belongs to no flag"),
        ("--model_path 'a\nb'", "'a\\nb' holds a line break or another control character"),
        ("--model_path a\0b", "'a\\x00b' holds a line break or another control character"),
        ('--pruner "ours', "no closing quotation; close what is open"),
    ],
)
def test_a_script_that_says_something_else_is_one_line(text, words, run) -> None:
    code, _, err = run("config", "--from-flags", text)
    assert code == 2
    assert words in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (r"""--a 'b "c"' --d "e \"f\" \g" --h i\ j""", ("--a", 'b "c"', "--d", 'e "f" \\g', "--h", "i j")),
        ("--a b#c --d '' # e", ("--a", "b#c", "--d", "")),
        ("--a b'c'\"d\"e", ("--a", "bcde")),
    ],
)
def test_words_are_those_of_a_shell(text, words) -> None:
    assert [command.words for command in commands(text, "f")] == [words]


def test_a_yaml_file_that_names_a_script_is_no_script(tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: python x.py --thr 0.1\n")
    assert read(path).values == {"model": "python x.py --thr 0.1"}
    path.write_text("python: 3\n")
    with pytest.raises(BadInput, match="unknown key"):
        read(path).check()
