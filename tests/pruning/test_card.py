"""Model cards as the hub reads them, and pipelines pushed to a small stand-in of its HTTP API."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from huggingface_hub import ModelCard, ModelCardData
from tiny import make_unet

import diffprune_plugin as dp
from diffprune_plugin.errors import BadInput
from diffprune_plugin.planning.plan import architecture_hash
from diffprune_plugin.pruning.card import BEGIN, END, renew_card, verdict_lines
from diffprune_plugin.pruning.directory import read_json
from diffprune_plugin.utils.files import check_unchanged
from diffprune_plugin.utils.tensors import weights_hash

SOURCE = "---\nlicense: apache-2.0\nbase_model: somebody/digits\n---\n# The dense one\n"


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """Made from a directory that has a card."""
    dense = dp.save(DDPMPipeline(make_unet(), DDPMScheduler(num_train_timesteps=100)), tmp_path / "dense")
    (dense / "README.md").write_text(SOURCE)
    pipeline = DDPMPipeline.from_pretrained(dense)
    dp.remove_(pipeline.unet, dp.make_plan(pipeline.unet, "magnitude", pruning_ratio=0.5))
    return dp.save(pipeline, tmp_path / "pruned")


def test_the_card_has_the_hubs_header_the_plan_the_sizes_and_how_to_load(pruned: Path) -> None:
    card = ModelCard.load(pruned / "README.md")
    found = card.data.to_dict()
    # All of the hub's own checks that need no hub: its `validate` is one request, which pushing to the stand-in makes.
    assert ModelCardData(**found, ignore_metadata_errors=False).to_dict() == found
    assert (found["library_name"], found["license"], found["base_model"]) == (
        "diffusers",
        "apache-2.0",
        "somebody/digits",
    )
    assert found["pipeline_tag"] == "unconditional-image-generation"
    assert {"diffprune-plugin", "pruning"} <= set(found["tags"])
    plan = dp.load(pruned).pruning_plan
    assert f"| {plan.params[1] / plan.params[0]:.1%} |" in card.text
    assert plan.sha256[:12] in card.text
    digest = hashlib.sha256((pruned / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert digest in card.text
    assert "trust_remote_code=True" in card.text
    assert str(pruned.parent) not in card.content


def test_what_people_wrote_around_it_stays_when_it_is_renewed_and_so_does_the_list_of_files(pruned: Path) -> None:
    path = pruned / "README.md"
    path.write_text(path.read_text().replace("license: apache-2.0", "license: mit") + "\nMy own words.\n")
    verdict = {"passed": True, "command": "diffprune-export m.onnx", "verify": "left out (--no-verify)"}
    renew_card(pruned, {"the export": verdict_lines(verdict)})
    card = ModelCard.load(path)
    assert card.data.license == "mit"
    assert card.text.rstrip().endswith("My own words.")
    assert card.text.count("# DDPMPipeline, pruned") == 1
    assert "`diffprune-export m.onnx`" in card.text
    check_unchanged(pruned)
    path.write_text(card.content.replace(END, ""))
    with pytest.raises(BadInput, match=rf"README\.md: its part that begins with {BEGIN} has no {END}"):
        renew_card(pruned)
    assert "My own words." in path.read_text()
    path.write_text("---\nlicense: mit\n---\nThree pages that I wrote.\n")
    for _ in range(2):
        renew_card(pruned)
    assert ModelCard.load(path).text.strip().startswith("Three pages that I wrote.\n\n" + BEGIN)
    assert path.read_text().count("# DDPMPipeline, pruned") == 1
    path.write_text("---\n- : [\n---\n")
    with pytest.raises(BadInput, match="its header cannot be read"):
        renew_card(pruned)
    with pytest.raises(BadInput, match=r"no model_index\.json"):
        renew_card(pruned / "unet")
    with pytest.raises(BadInput, match="not valid json"):
        read_json(path)


def test_the_card_tells_what_was_measured_of_each_and_keeps_what_an_earlier_one_told(pruned: Path, run: Any) -> None:
    place = pruned.parent
    facts: dict[str, Any] = {
        "models": {"model": {"name": "small", "params": 5, "KID": {"mean": 0.25, "subsets_std": 0.1}}, "against": {}},
        "compared": {"SSIM": 0.951, "PSNR": None, "loss_difference": 1.5e-4},
    }
    (place / "evaluation").mkdir()
    (place / "evaluation/evaluation.json").write_text(json.dumps(facts))
    (place / "m.verdict.json").write_text('{"passed": true, "verify": "left out (--no-verify)"}')
    assert run("card", pruned, "--verdict", place / "m.verdict.json")[0] == 0
    code, _, err = run("card", pruned, "--evaluation", place / "evaluation")
    assert code == 2
    assert f"it is of small, whose weights are others than {pruned}'s" in err
    facts["models"]["model"]["weights"] = weights_hash(dp.load(pruned))
    (place / "evaluation/evaluation.json").write_text(json.dumps(facts))
    assert run("card", pruned, "--evaluation", place / "evaluation")[0] == 0
    assert run("card", pruned)[0] == 0
    text = (pruned / "README.md").read_text()
    part = text.partition("## Measured")[2].partition("##")[0].strip()
    assert part.splitlines() == [
        "- the export",
        "  - it held",
        "  - the file: left out (--no-verify)",
        "- `diffprune evaluate`",
        "  - model (small): KID 0.25",
        "  - compared, from the same noise: SSIM 0.951, loss_difference 0.00015",
    ]
    of_its_config = {"source_config_sha256": architecture_hash(dp.load(pruned))}
    for plan, code in (("0" * 64, 2), (dp.load(pruned).pruning_plan.sha256, 0)):
        export = {"provenance": {**of_its_config, "plan_sha256": plan}}
        content = {"passed": True, "model": "other", "verify": "left out", "export": export}
        (place / "n.verdict.json").write_text(json.dumps(content))
        found, _, err = run("card", pruned, "--verdict", place / "n.verdict.json")
        assert (found, "it is of other, another model than" in err) == (code, bool(code))
    (pruned / "README.md").write_text(text)
    for content, words in (
        ('{"files": {}}', "no verdict of diffprune-export"),
        (json.dumps(facts), "no verdict of diffprune-export"),
        ('{"passed": true}', "no verdict of diffprune-export"),
        ('{"passed": true, "verify": {}}', "damaged: KeyErr"),
    ):
        (place / "m.verdict.json").write_text(content)
        code, _, err = run("card", pruned, "--verdict", place / "m.verdict.json")
        assert code == 2
        assert words in err
    assert (pruned / "README.md").read_text() == text


def test_an_export_that_gave_nothing_finite_is_told_by_the_card_too() -> None:
    """As the verdict has it: JSON has no number for an error without an end."""
    verify = {"cases": [{}, {}], "worst": {"absolute": None, "relative": None}, "passed": False}
    lines = verdict_lines({"passed": False, "failure": "unet missed", "parts": {"unet": {"verify": verify}}})
    assert lines == ["it did NOT hold: unet missed", "unet: 2 cases against PyTorch, worst relative not finite"]


class Hub(BaseHTTPRequestHandler):
    """What of the hub's HTTP API a push and a download take: one repository, its files in a dict."""

    files: dict[str, bytes]

    def answer(self, content: Any, headers: dict[str, str] | None = None, body: bool = True) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def do_POST(self) -> None:
        given = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/repos/create"):
            self.answer({"url": f"{self.server.address}/me/small", "name": "me/small", "id": "me/small"})  # type: ignore[attr-defined]
        elif "/preupload/" in self.path:
            files = json.loads(given)["files"]
            kinds = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": file["path"], **kinds} for file in files]})
        elif "/commit/" in self.path:
            for line in map(json.loads, given.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/me/small/commit/{'a' * 40}"  # type: ignore[attr-defined]
            self.answer({"success": True, "commitUrl": url, "commitOid": "a" * 40, "hookOutput": ""})
        else:
            self.answer({})

    def do_GET(self, body: bool = True) -> None:
        path = unquote(self.path.partition("?")[0])
        if "/resolve/" in path:
            name = path.partition("/resolve/")[2].partition("/")[2]
            if name not in self.files:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            digest = hashlib.sha256(self.files[name]).hexdigest()
            self.answer(self.files[name], {"ETag": f'"{digest}"', "X-Repo-Commit": "a" * 40}, body)
        elif path.startswith("/api/models/me/small"):
            names = [{"rfilename": name} for name in sorted(self.files)]
            rows = [{"type": "file", "path": n, "size": len(d), "oid": "0" * 40} for n, d in sorted(self.files.items())]
            facts = {"id": "me/small", "modelId": "me/small", "sha": "a" * 40, "siblings": names, "tags": []}
            self.answer(rows if "/tree/" in path else facts | {"private": False, "downloads": 0, "likes": 0}, body=body)
        else:
            self.answer({"name": "me", "type": "user", "orgs": []}, body=body)

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Any:
    handler = type("OneHub", (Hub,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.address = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


PUSH = """
import sys, json, os
import diffprune_plugin
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
DiffusionPipeline.from_pretrained(sys.argv[1]).push_to_hub("me/small", token="hf_none")
HfApi(token="hf_none").upload_folder(repo_id="me/small", folder_path=sys.argv[1])
"""
PULL = """
import sys, torch, numpy as np
if sys.argv[1] == "imported":
    import diffprune_plugin
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained("me/small", trust_remote_code=True)
generator = torch.Generator().manual_seed(0)
images = pipeline(generator=generator, num_inference_steps=2, output_type="np").images
np.save(sys.argv[2], images)
print(type(pipeline.unet).__module__)
"""


@pytest.mark.slow
def test_a_pruned_pipeline_is_pushed_to_a_hub_and_loads_from_there_with_and_without_us(
    pruned: Path, hub: Any, tmp_path: Path
) -> None:
    def python(code: str, *words: str, **env: str) -> str:
        given = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "cache"), **env}
        given |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"}
        child = subprocess.run(
            [sys.executable, "-c", code, *words], env=given, cwd=tmp_path, capture_output=True, text=True
        )
        assert child.returncode == 0, child.stderr[-3000:]
        return child.stdout

    python(PUSH, str(pruned))
    files = hub.RequestHandlerClass.files
    assert {"model_index.json", "README.md", "unet/diffprune_plugin.py", "unet/pruning_plan.json"} <= set(files)
    assert files["README.md"] == (pruned / "README.md").read_bytes()
    generator = torch.Generator().manual_seed(0)
    loaded = DDPMPipeline(dp.load(pruned), DDPMScheduler(num_train_timesteps=100))
    expected = loaded(generator=generator, num_inference_steps=2, output_type="np").images
    bare = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in getattr(f, '__name__', '').lower()]"
    )
    own = python(bare + PULL, "without", str(tmp_path / "a.npy"), PYTHONPATH="")
    assert own.strip().endswith("diffusers_modules.local.diffprune_plugin") or "diffusers_modules" in own
    shutil.rmtree(tmp_path / "cache")
    assert python(PULL, "imported", str(tmp_path / "b.npy")).strip().endswith("diffprune_plugin")
    for name in ("a", "b"):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), expected)
