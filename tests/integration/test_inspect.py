"""`expertmesh inspect` on real models, against counts by transformers alone, and its page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from expertmesh.cli import main
from expertmesh.inspect.findings import find
from expertmesh.inspect.texts import Domain
from expertmesh.inspect.watch import WINDOW, Reader, load_reader
from expertmesh.models import heldout, tiny_path
from expertmesh.serve.text import TextCodec
from tests.architectures.checkpoints import SKIPPED, Architecture, build_model, find_architectures

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
ARCHITECTURES = [one for one in find_architectures() if one.experts_class not in SKIPPED]

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def inspect_command(monkeypatch, capsys) -> Command:
    """Runs `expertmesh inspect ...` in this process: its exit code, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["expertmesh", "inspect", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def texts(tmp_path: Path) -> list[Path]:
    """Prose and code, short."""
    paths = [tmp_path / "prose.txt", tmp_path / "code.py"]
    for path, domain in zip(paths, ("scripture", "python"), strict=True):
        path.write_text(heldout(domain)[:5000], encoding="utf-8")
    return paths


def count_by_transformers(text: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Per layer, the tokens of each expert, and the mean share of the first of two weights; from the gates' logits."""
    model = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(tiny_path())(text, add_special_tokens=False)["input_ids"]
    logits: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.register_forward_hook(lambda _, args, out, name=name: logits.setdefault(name, []).append(out[0]))
    with torch.no_grad():
        for start in range(0, len(ids), WINDOW):
            model(torch.tensor([ids[start : start + WINDOW]]))
    best = [torch.cat(parts).topk(2) for parts in logits.values()]
    counts = torch.stack([torch.bincount(layer.indices.flatten(), minlength=16) for layer in best])
    return counts, torch.stack([layer.values.softmax(dim=1)[:, 0].mean() for layer in best])


def test_counts_and_confidence_are_those_of_the_gates_logits(inspect_command: Command, texts: list[Path]):
    code, out, _ = inspect_command("tiny", "--text", *texts, "--dtype", "float32", "--json")
    report = json.loads(out)
    assert code == 0
    for place, path in enumerate(texts):
        counts, confidence = count_by_transformers(path.read_text(encoding="utf-8"))
        uses = [layer["domains"][place] for layer in report["layers"]]
        assert [use["domain"] for use in uses] == [path.stem] * 4
        assert [use["tokens"] for use in uses] == counts.tolist()
        assert report["tokens"][path.stem] * 2 == counts[0].sum()
        assert [use["confidence"]["mean"] for use in uses] == pytest.approx(confidence.tolist(), abs=1e-5)


@pytest.mark.parametrize("source", ["what the model was trained for", "this project"])
def test_prose_and_code_have_experts_of_their_own(source: str):
    """In every layer, prose is further from any code than two parts of prose, or two of code, are from each other."""
    if source == "this project":
        prose, code = (ROOT / "LICENSE").read_text(), (ROOT / "expertmesh" / "placement.py").read_text()
    else:
        prose, code = heldout("scripture"), heldout("python")
    parts = {"prose 1": prose[:4000], "prose 2": prose[4000:8000], "code 1": code[:4000], "code 2": code[4000:8000]}
    reader = load_reader(tiny_path())
    readings = [reader.read(Domain(name=name, documents=(text,)), 2000, ignore) for name, text in parts.items()]
    for layer in find(reader.num_experts, readings, range(4), reader.codec):
        within = [each.value for each in layer.distances if each.domains[0][:4] == each.domains[1][:4]]
        between = [each.value for each in layer.distances if each.domains[0][:4] != each.domains[1][:4]]
        assert (len(within), len(between)) == (2, 4)
        assert min(between) > max(within)


def ignore(done: int, total: int) -> None:
    """Of progress."""


def test_the_same_texts_give_the_same_bytes(inspect_command: Command, texts: list[Path], tmp_path: Path):
    outs = []
    for name in ("one.html", "other.html"):
        code, out, _ = inspect_command(
            "tiny", "--text", *texts, "--json", "--html", tmp_path / name, "--max-tokens", 700
        )
        assert code == 0
        outs.append((out, (tmp_path / name).read_bytes()))
    assert outs[0] == outs[1]


def test_the_terminal_shows_each_domain_and_layer(inspect_command: Command, texts: list[Path]):
    code, out, _ = inspect_command("tiny", "--text", *texts, "--layers", "1,3", "--max-tokens", 500)
    assert code == 0
    assert "500 of prose, 500 of code" in " ".join(out.split())
    assert re.findall(r"^ +(\d) +\d+% +\d+% +0\.\d\d +\d\d%", out, re.MULTILINE) == ["1", "3"]
    assert out.count("layer 1 ") == out.count("layer 3 ") == 2


def test_files_may_follow_each_option_or_the_first(inspect_command: Command, texts: list[Path]):
    options = ("--max-tokens", 50, "--json")
    _, together, _ = inspect_command("tiny", "--text", *texts, *options)
    _, apart, _ = inspect_command("tiny", "--text", texts[0], "--text", texts[1], *options)
    assert json.loads(together) == json.loads(apart)


def word_tokenizer(begin: bool = False) -> PreTrainedTokenizerFast:
    """Token n is the word "w<n>", for vocabularies of tiny models; with `begin`, each text begins with token 1."""
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(111)}, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if begin:
        tokenizer.post_processor = processors.TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.experts_class)
def test_every_architecture_can_be_read_with(architecture: Architecture):
    transformers.logging.set_verbosity_error()
    model = build_model(architecture)
    ids = [17, 99, 5, 64, 23, 110, 42, 8, 77, 31]
    reader = Reader(model, TextCodec(word_tokenizer()))
    reading = reader.read(Domain(name="words", documents=(" ".join(f"w{n}" for n in ids),)), 100, ignore)
    assert reading.ids_T.tolist() == ids
    assert reading.layers
    for layer, choices in reading.layers.items():
        assert len(choices.index_TK) == len(ids)
        assert choices.index_TK.min() >= -1
        assert choices.index_TK.max() < reader.num_experts[layer]
        assert bool(((choices.weights_TK > 0) == choices.is_expert_TK).all())
    assert len(list(find(reader.num_experts, [reading], list(reading.layers), reader.codec))) == len(reading.layers)


def test_a_token_before_every_text_is_read_and_not_counted():
    model = build_model(Architecture(experts_class="", model_type="qwen3_moe", auto_class=None))
    dressed, plain = (Reader(model, TextCodec(word_tokenizer(begin))) for begin in (True, False))
    with_it = dressed.read(Domain(name="words", documents=("w17 w99 w5",)), 100, ignore)
    spelled = plain.read(Domain(name="words", documents=("w1 w17 w99 w5",)), 100, ignore)
    assert with_it.ids_T.tolist() == [17, 99, 5]
    for layer, choices in with_it.layers.items():
        assert torch.equal(choices.index_TK, spelled.layers[layer].index_TK[1:])
        assert torch.equal(choices.weights_TK, spelled.layers[layer].weights_TK[1:])


def test_a_long_text_is_read_in_windows_up_to_the_limit():
    model = build_model(Architecture(experts_class="", model_type="qwen3_moe", auto_class=None))
    reader = Reader(model, TextCodec(word_tokenizer()))  # takes 128 positions
    done: list[int] = []
    documents = (" ".join(["w7"] * 300), "w8 w9", " ".join(["w10"] * 300))
    reading = reader.read(Domain(name="words", documents=documents), 400, lambda now, total: done.append(now))
    assert reading.ids_T.tolist() == [7] * 300 + [8, 9] + [10] * 98
    assert done == [0, 128, 256, 300, 302, 400]


def without_experts(folder: Path) -> Path:
    transformers.logging.disable_progress_bar()
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def without_tokenizer(folder: Path) -> Path:
    return Path(shutil.copytree(tiny_path(), folder, ignore=shutil.ignore_patterns("tokenizer*")))


def bad_files(folder: Path) -> dict[str, Path]:
    for name, data in {
        "good.txt": b"some text",
        "empty.txt": b"",
        "blank.txt": b" \n\t\n",
        "sixteen.txt": "some text".encode("utf-16"),
        "latin.txt": "caf\xe9".encode("latin-1"),
    }.items():
        (folder / name).write_bytes(data)
    (folder / "nothing").mkdir()
    (folder / "other").mkdir()
    (folder / "other" / "good.py").write_text("x = 1")
    return {path.name: path for path in [*folder.iterdir(), folder / "other" / "good.py", folder / "missing.txt"]}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "--text is missing"),
        (("missing.txt",), "there is no file .*missing.txt"),
        (("good.txt", "empty.txt"), "empty.txt is empty"),
        (("blank.txt",), "blank.txt is empty"),
        (("sixteen.txt",), "sixteen.txt is not UTF-8 .byte 0xff at offset 0.: convert it"),
        (("latin.txt",), "latin.txt is not UTF-8 .byte 0xe9 at offset 3.: convert it"),
        (("nothing",), "nothing holds no files"),
        (("good.txt", "good.py"), "two domains are named 'good'"),
    ],
)
def test_a_bad_text_is_one_clear_line(inspect_command: Command, tmp_path: Path, files: tuple[str, ...], message: str):
    paths = bad_files(tmp_path)
    assert_refused(inspect_command("tiny", *(("--text", *(paths[name] for name in files)) if files else ())), message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "7"), "the model has MoE layers 0 to 3"),
        (("--html", "/no/such/folder/report.html"), "there is no folder /no/such/folder"),
        (("--device", "abacus"), "--device 'abacus' cannot be used"),
        (("--dtype", "int3"), "dtype 'int3' is not one of"),
    ],
)
def test_a_bad_option_is_one_clear_line(
    inspect_command: Command, texts: list[Path], options: tuple[str, ...], message: str
):
    assert_refused(inspect_command("tiny", "--text", *texts, *options), message)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (without_experts, "architecture 'llama' has no experts"),
        (without_tokenizer, "has no tokenizer"),
        (lambda folder: folder, "no model '.*model': give a checkpoint folder"),
    ],
)
def test_a_bad_model_is_one_clear_line(
    inspect_command: Command, texts: list[Path], tmp_path: Path, build: Callable[[Path], Path], message: str
):
    assert_refused(inspect_command(build(tmp_path / "model"), "--text", *texts), message)


def assert_refused(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    lines = [line for line in err.splitlines() if line and not line.startswith(("loading", "reading"))]
    assert (code, out) == (2, "")
    assert len(lines) == 1, err
    assert re.search(message, lines[0]), lines[0]


def chromium(page: Path, *options: str) -> str:
    """What headless Chromium writes to standard output."""
    assert CHROMIUM is not None
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
    profile = f"--user-data-dir={page.parent / 'profile'}"
    done = subprocess.run(
        [CHROMIUM, *quiet, profile, *options, page.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_the_page_opens_in_a_browser(inspect_command: Command, texts: list[Path], tmp_path: Path):
    page = tmp_path / "report.html"
    code, out, _ = inspect_command("tiny", "--text", *texts, "--html", page, "--json")
    assert code == 0
    report = json.loads(out)

    dom = chromium(page, "--dump-dom")
    sections = dict(re.findall(r'<section id="(\w+)">(.*?)</section>', dom, re.DOTALL))
    cells = 4 * 16  # layers, experts
    assert len(re.findall(r"<rect [^>]*><title>layer \d, expert \d+: ", sections["domains"])) == 2 * cells
    assert len(re.findall(r"<rect [^>]*><title>layer \d, expert \d+: ", sections["differences"])) == cells
    assert len(re.findall("<circle ", sections["load"])) == cells
    assert len(re.findall("<circle ", sections["balance"])) == 4 * (3 + 2)
    assert len(re.findall(r'class="outline ', sections["confidence"])) == 4 * 2
    assert len(re.findall("<article>", sections["tokens"])) == cells
    for layer in report["layers"]:
        assert (
            f"layer {layer['layer']}, expert 3: {16 * layer['domains'][1]['shares'][3]:.2f} times"
            in sections["domains"]
        )
    for name in ("domains", "differences", "load", "balance", "confidence", "twins", "tokens"):
        assert sections[name].count("How to read it") == sections[name].count("What would be a worry") == 1
    assert "tokens of prose" in dom
    assert "<script" not in dom
    assert not re.findall(r"(?:src|href)=|url\(|@import", dom), "the page reaches for something outside of itself"

    for width, name in ((1000, "desk.png"), (500, "phone.png")):
        picture = tmp_path / name
        chromium(page, f"--screenshot={picture}", f"--window-size={width},3000")
        assert_drawn(picture, width)


def assert_drawn(picture: Path, width: int) -> None:
    """It has many colors, and in every part of its height something other than the ground."""
    image: Any = (matplotlib.image.imread(picture)[..., :3] * 255).round().astype(np.uint8)
    assert image.shape == (3000, width, 3)
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 200
    for band in np.split(image, 10):
        assert (band != image[0, 0]).any(axis=2).mean() > 0.01
