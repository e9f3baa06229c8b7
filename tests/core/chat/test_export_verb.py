"""`nanochat export`: from a stage or a directory to one that others read, and to the hub."""

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from nanochat_core.cli import main
from nanochat_core.infer.load import load_chat

IDX = torch.tensor([[1, 2, 3, 250, 7, 9, 100]])


@pytest.fixture
def export(monkeypatch, capsys):
    def export(*words: object) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["nanochat", "export", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            main.main()
        return int(end.value.code or 0), capsys.readouterr().err

    return export


def evaluated(base: Path, stage: str, model: tuple[str, str], **metrics: float) -> None:
    """A finished evaluation of a model, as its stage leaves it."""
    directory = base / f"{stage}" / f"{stage}-{model[1]}"
    directory.mkdir(parents=True)
    source = {"stage": model[0], "fingerprint": model[1]}
    (directory / "job.json").write_text(json.dumps({"inputs": {"model": source}}))
    result = {"format": 1, "metrics": metrics, "files": {}, "inputs": {}}
    (directory / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize("arch", ["seed", "modern"])
def test_a_stage_is_exported_with_the_numbers_that_belong_to_it(
    arch, export, trained, random_model, tmp_path
) -> None:
    model = random_model(arch)
    directory = trained(model)
    job = json.loads((directory / "job.json").read_text())
    job["inputs"]["model"] = {"stage": "pretrain", "fingerprint": "p0"}
    (directory / "job.json").write_text(json.dumps(job))
    base = tmp_path / "pretrain" / "p0"
    base.mkdir(parents=True)
    (base / "job.json").write_text(json.dumps({"inputs": {}}))
    evaluated(tmp_path, "sft_eval", ("sft", "s0"), **{"sft/chatcore": 0.25})
    evaluated(tmp_path, "base_eval", ("pretrain", "p0"), **{"base/core": 0.125})
    evaluated(tmp_path, "mid_eval", ("mid", "another"), **{"mid/chatcore": 0.5})

    target = tmp_path / "my model"
    code, said = export(directory, target)
    assert code == 0 and f"{model.num_params():,} parameters" in said and "nanochat chat '" in said
    loaded, _ = load_chat(target)
    assert torch.equal(loaded(IDX), model(IDX))
    card = (target / "README.md").read_text()
    assert "# my model" in card and "| sft_eval | sft/chatcore | 0.2500 |" in card
    assert "| base_eval | base/core | 0.1250 |" in card and "mid" not in card and "no GGUF" in card

    code, _ = export(target, tmp_path / "half", "--dtype", "bfloat16", "--name", "Half")
    half, _ = load_chat(tmp_path / "half", dtype=torch.bfloat16)
    assert code == 0 and half.lm_head.weight.dtype == torch.bfloat16
    torch.testing.assert_close(half(IDX), model(IDX), atol=0.5, rtol=0.1)
    assert export(directory, target)[0] == 0, "an export may be written again"


def test_what_cannot_be_exported_is_one_clear_line(export, trained, random_model, tmp_path) -> None:
    directory = trained(random_model("seed"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "diary.txt").write_text("mine")
    for target in (tmp_path / "full", directory, tmp_path / "full" / "diary.txt"):
        code, said = export(directory, target)
        assert code == 2 and said.startswith("error: ") and "something else" in said
    assert (tmp_path / "full" / "diary.txt").read_text() == "mine"
    code, said = export(tmp_path / "absent", tmp_path / "out")
    assert code == 2 and "there is no directory" in said
    code, said = export("sft", tmp_path / "out", "--base-dir", tmp_path / "empty")
    assert code == 2 and "nothing has been trained" in said
    assert not (tmp_path / "out").exists()


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as takes in small files."""

    files: dict[str, bytes]
    private: list[bool]
    token = "hf_mine"

    def do_GET(self) -> None:
        self._answer({"type": "user", "name": "me", "fullname": "Me", "orgs": []})

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.private.append(asked.get("private") or asked.get("visibility") == "private")
            self._answer({"url": f"{constants.ENDPOINT}/me/{asked['name']}", "name": f"me/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self._answer(
                {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
            )
        else:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self._answer(
                {"commitUrl": f"{constants.ENDPOINT}/me/x/commit/1", "commitOid": "1", "success": True}
            )

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, content: dict[str, Any]) -> None:
        allowed = self.headers.get("Authorization") == f"Bearer {self.token}"
        text = json.dumps(content if allowed else {"error": "Invalid credentials"}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[type[Hub]]:
    class Handler(Hub):
        pass

    Handler.files, Handler.private = {}, []
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield Handler
        server.shutdown()
        thread.join()


def test_an_export_is_sent_to_the_hub_by_its_own_client(
    export, trained, random_model, tmp_path, hub, monkeypatch
) -> None:
    target = tmp_path / "out"
    directory = trained(random_model("seed"))
    code, said = export(directory, target, "--push", "me/x")
    assert code == 0 and said.splitlines()[-1] == f"sent to {constants.ENDPOINT}/me/x", said
    assert set(hub.files) == {path.name for path in target.iterdir()} and hub.private == [True]
    assert hub.files["config.json"] == (target / "config.json").read_bytes()
    assert hub.files["model.safetensors"] == (target / "model.safetensors").read_bytes()

    monkeypatch.setenv("HF_TOKEN", "hf_stolen")
    code, said = export(directory, target, "--push", "me/x")
    assert code == 2 and "HF_TOKEN may not write to me/x" in said
    monkeypatch.delenv("HF_TOKEN")
    code, said = export(directory, target, "--push", "me/x")
    assert code == 2 and "set HF_TOKEN" in said
