"""Whatever cannot become a bank ends with exit code 2, a message that names the place, and no file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from server import cli

from .planted import CONFIG, HIDDEN, INNER, down_proj, o_proj, planted_pair, q_proj

Damage = Callable[[Path, Path], None]


@pytest.fixture
def undertow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The command line with this part's command alone."""
    monkeypatch.setattr(cli, "COMMANDS", ("guard.commands.bank",))
    return lambda *words: cli.main([str(word) for word in words])


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder: Path, **fields: object) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))


def other_shape(base: Path, tuned: Path) -> None:
    edit(tuned, lambda tensors: tensors.update({down_proj(1): torch.zeros(HIDDEN, INNER + 1)}))


def missing_in_tuned(base: Path, tuned: Path) -> None:
    edit(tuned, lambda tensors: tensors.pop(o_proj(2)))


def missing_in_base(base: Path, tuned: Path) -> None:
    edit(base, lambda tensors: tensors.pop(o_proj(2)))


def holds_nan(base: Path, tuned: Path) -> None:
    edit(tuned, lambda tensors: tensors[o_proj(0)][3].fill_(float("nan")))


def base_holds_infinity(base: Path, tuned: Path) -> None:
    edit(base, lambda tensors: tensors[down_proj(0)][:, 7].fill_(float("-inf")))


def truncated(base: Path, tuned: Path) -> None:
    file = tuned / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def truncated_header(base: Path, tuned: Path) -> None:
    file = tuned / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def empty_file(base: Path, tuned: Path) -> None:
    (tuned / "model.safetensors").write_bytes(b"")


def greedy_header(base: Path, tuned: Path) -> None:
    (tuned / "model.safetensors").write_bytes((2**63).to_bytes(8, "little") + b"{}")


def absent_shard(base: Path, tuned: Path) -> None:
    (tuned / "model.safetensors").unlink()
    index = {"weight_map": {down_proj(0): "model-00001-of-00002.safetensors"}}
    (tuned / "model.safetensors.index.json").write_text(json.dumps(index))


def shard_elsewhere(base: Path, tuned: Path) -> None:
    (tuned / "model.safetensors").unlink()
    index = {"weight_map": {down_proj(0): "../base/model.safetensors"}}
    (tuned / "model.safetensors.index.json").write_text(json.dumps(index))


def index_of_other_tensors(base: Path, tuned: Path) -> None:
    index = {"weight_map": {"model.layers.7.x": "model.safetensors"}}
    (tuned / "model.safetensors.index.json").write_text(json.dumps(index))


def two_models_in_one_folder(base: Path, tuned: Path) -> None:
    (tuned / "part.safetensors").write_bytes((base / "model.safetensors").read_bytes())
    index = {"weight_map": {down_proj(0): "part.safetensors"}}
    (tuned / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(base: Path, tuned: Path) -> None:
    (tuned / "model.safetensors").unlink()
    (tuned / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


def pickle_in_disguise(base: Path, tuned: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tuned / "model.safetensors")


def no_weights(base: Path, tuned: Path) -> None:
    (tuned / "model.safetensors").unlink()


def same_weights(base: Path, tuned: Path) -> None:
    (tuned / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes())


def only_queries_by_rounding(base: Path, tuned: Path) -> None:
    same_weights(base, tuned)
    edit(tuned, lambda tensors: tensors.update({q_proj(1): tensors[q_proj(1)].bfloat16()}))


def other_class(base: Path, tuned: Path) -> None:
    configure(tuned, architectures=["MistralForCausalLM"])


def other_depth(base: Path, tuned: Path) -> None:
    configure(tuned, num_hidden_layers=2)


def other_width(base: Path, tuned: Path) -> None:
    configure(base, hidden_size=128)
    configure(tuned, hidden_size=128)


def unknown_class(base: Path, tuned: Path) -> None:
    configure(tuned, architectures=["MixtralForCausalLM"], model_type="mixtral")


def unknown_type(base: Path, tuned: Path) -> None:
    configure(tuned, architectures=None, model_type="gpt2")


def nameless(base: Path, tuned: Path) -> None:
    configure(tuned, architectures=None, model_type=None)


def quantised(base: Path, tuned: Path) -> None:
    configure(tuned, quantization_config={"quant_method": "gptq"})


def integers(base: Path, tuned: Path) -> None:
    edit(tuned, lambda tensors: tensors.update({o_proj(0): tensors[o_proj(0)].to(torch.int8)}))


def no_config(base: Path, tuned: Path) -> None:
    (tuned / "config.json").unlink()


def broken_config(base: Path, tuned: Path) -> None:
    (tuned / "config.json").write_text("{'architectures'")


def config_without_size(base: Path, tuned: Path) -> None:
    configure(tuned, hidden_size="64")


REFUSALS: dict[Damage, str] = {
    other_shape: r"tensor model\.layers\.1\.mlp\.down_proj\.weight: shape \[64, 160\] in base, \[64, 161\] in tuned",
    missing_in_tuned: r"tuned: tensor model\.layers\.2\.self_attn\.o_proj\.weight is missing",
    missing_in_base: r"base: tensor model\.layers\.2\.self_attn\.o_proj\.weight is missing",
    holds_nan: r"tuned: tensor model\.layers\.0\.self_attn\.o_proj\.weight holds NaN or infinity",
    base_holds_infinity: r"base: tensor model\.layers\.0\.mlp\.down_proj\.weight holds NaN or infinity",
    truncated: r"model\.safetensors: is truncated: \d+ bytes, but the header describes \d+",
    truncated_header: r"model\.safetensors: is truncated or not safetensors",
    empty_file: r"model\.safetensors: is truncated: 0 bytes",
    greedy_header: r"not safetensors: header length 9223372036854775808, expected at most 100000000",
    absent_shard: r"index\.json: names shard model-00001-of-00002\.safetensors, which is absent",
    shard_elsewhere: r"weight_map of .*: '\.\./base/model\.safetensors', expected a \.safetensors file beside",
    index_of_other_tensors: r"places tensor model\.layers\.7\.x in model\.safetensors, which does not hold it",
    two_models_in_one_folder: r"holds both model\.safetensors and model\.safetensors\.index\.json",
    pickled: r"pytorch_model\.bin is a pickle, .* convert to safetensors",
    pickle_in_disguise: r"model\.safetensors: is a pickle, .* convert to safetensors",
    no_weights: r"holds neither model\.safetensors nor model\.safetensors\.index\.json",
    same_weights: r"hold the same weights \(sha256:[0-9a-f]{64}\): there is no delta",
    only_queries_by_rounding: r"residual-writing matrices unchanged.*model\.layers\.1\.self_attn\.q_proj\.weight$",
    other_class: r"model_class is MistralForCausalLM, but LlamaForCausalLM in .*: not the same architecture",
    other_depth: r"num_layers is 2, but 3 in",
    other_width: r"o_proj\.weight: shape \[64, 96\], expected \[128, inputs\] as hidden_size in config\.json says",
    unknown_class: r"MixtralForCausalLM is not supported yet; supported: LlamaForCausalLM, ",
    unknown_type: r"gpt2 is not supported yet",
    nameless: r"names neither architectures nor model_type",
    quantised: r"field quantization_config: quantised checkpoints are not supported yet",
    integers: r"o_proj\.weight has dtype I8, expected one of F32, F16, BF16",
    no_config: r"config\.json: missing",
    broken_config: r"config\.json: not valid JSON",
    config_without_size: r"field hidden_size: '64', expected a positive integer",
}


@pytest.mark.parametrize("damage", REFUSALS, ids=lambda damage: damage.__name__)
def test_it_is_refused_and_nothing_is_written(
    tmp_path: Path, undertow: Callable[..., int], capsys: pytest.CaptureFixture[str], damage: Damage
) -> None:
    base, tuned = planted_pair(tmp_path)
    damage(base, tuned)
    out = tmp_path / "out.bank"

    code = undertow("bank", "build", "--base", base, "--tuned", tuned, "--out", out)

    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert re.search(REFUSALS[damage], message), message
    assert message.startswith("undertow: ")
    assert not out.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "tuned"]
