"""``squall-compress``: what is typed, what it does, and what it says to what it can't do."""

from __future__ import annotations

import sys

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from squall.conf import compress
from squall.models import ImageClassifier, LeNet300
from squall.sparsity import CompressedCheckpointIO, load_compressed, save_compressed
from tests.sparsity.tensors import same


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Call the command in this process, in `tmp_path`; return its exit code, and what it wrote to stderr and stdout."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["squall-compress", *arguments])
        code = 0
        try:
            compress.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return code, captured.err, captured.out

    return called


@pytest.fixture
def dense(tmp_path):
    """A state_dict on disk."""
    torch.manual_seed(0)
    state_dict = LeNet300(num_classes=10, image_size=28, in_channels=1).state_dict()
    torch.save(state_dict, tmp_path / "dense.pt")
    return state_dict


def test_prune_share_code_and_back(call, dense, tmp_path):
    arguments = ["density.fc1=0.08", "density.fc2=0.09", "density.fc3=0.26", "bits.fc=6", "bits.fc3=5"]
    code, error, output = call("dense.pt", "out.safetensors", *arguments)
    assert code == 0, error
    assert "fc1" in output
    assert f"{(tmp_path / 'out.safetensors').stat().st_size:,} in out.safetensors" in output
    loaded = load_compressed(tmp_path / "out.safetensors")
    assert list(loaded) == list(dense)
    for layer, density, bits in (("fc1", 0.08, 6), ("fc2", 0.09, 6), ("fc3", 0.26, 5)):
        weight, before = loaded[f"{layer}.weight"], dense[f"{layer}.weight"]
        kept = weight != 0
        assert int(kept.sum()) == round(density * weight.numel())
        assert before[kept].abs().min() >= before[~kept].abs().max()
        assert len(weight[kept].unique()) <= 1 << bits
        assert (weight - before)[kept].abs().max() < 0.02
        assert same(loaded[f"{layer}.bias"], dense[f"{layer}.bias"])
    assert (tmp_path / "out.safetensors").stat().st_size < 1_066_440 / 35
    assert call("--decode", "out.safetensors", "back.pt")[0] == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert list(back) == list(dense)
    assert all(same(back[name], loaded[name]) for name in dense)
    assert not (tmp_path / "outputs").exists()


def test_without_settings_nothing_is_lost(call, dense, tmp_path):
    assert call("dense.pt", "out.safetensors", "coder=huffman", "gap_bits=5")[0] == 0
    loaded = load_compressed(tmp_path / "out.safetensors")
    assert all(same(loaded[name], dense[name]) for name in dense)


def test_a_compressed_file_is_pruned_further(call, dense, tmp_path):
    assert call("dense.pt", "half.safetensors", "density.fc=0.5")[0] == 0
    assert call("half.safetensors", "less.safetensors", "density.fc1=0.1")[0] == 0
    weight = load_compressed(tmp_path / "less.safetensors")["fc1.weight"]
    assert int(weight.count_nonzero()) == round(0.1 * weight.numel())


def test_lightning_checkpoints(call, tmp_path):
    module = ImageClassifier(LeNet300(num_classes=10, image_size=28, in_channels=1, width=0.1))
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    data = DataLoader(TensorDataset(torch.randn(8, 1, 28, 28), torch.arange(8)), batch_size=4)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "epoch=1-step=2.ckpt")
    assert call("epoch=1-step=2.ckpt", "out.safetensors", "density.fc1=0.2", "bits.model.fc2=3")[0] == 0
    loaded = load_compressed(tmp_path / "out.safetensors")
    assert list(loaded) == list(module.state_dict())
    assert len(loaded["model.fc2.weight"].unique()) <= 8
    assert call("--decode", "out.safetensors", "back.ckpt")[0] == 0
    trainer.test(module, data, ckpt_path=tmp_path / "back.ckpt", verbose=False)
    assert all(same(module.state_dict()[name], loaded[name]) for name in loaded)


def test_the_more_specific_name_wins_in_any_order(call, tmp_path):
    names = ("net.fc1", "net.fc2", "head.0.1", "e")
    state_dict = {f"{name}.weight": torch.randn(20, 20) for name in names}
    torch.save({**state_dict, "none.weight": torch.zeros(0, 5), "no": torch.zeros(0)}, tmp_path / "dense.pt")
    arguments = ["density.net=0.5", "density.net.fc1=0.1", "density=0.2", "density.head.0.1=1", "bits=3"]
    for order in (arguments, arguments[::-1]):
        code, error, _ = call("dense.pt", "out.safetensors", *order)
        assert code == 0, error
        loaded = load_compressed(tmp_path / "out.safetensors")
        assert [int(loaded[f"{name}.weight"].count_nonzero()) for name in names] == [40, 200, 400, 80]
        assert all(len(loaded[f"{name}.weight"].unique()) <= 9 for name in names)
        assert loaded["none.weight"].shape == (0, 5)
        assert loaded["no"].shape == (0,)


def test_a_whole_checkpoint_is_decoded_whole_and_compressed_again(call, tmp_path):
    state_dict = {"fc.weight": torch.randn(20, 20), "fc.bias": torch.zeros(20)}
    checkpoint = {"state_dict": state_dict, "epoch": 3, "loops": {"fit": [1, (2, None)]}}
    CompressedCheckpointIO().save_checkpoint(checkpoint, tmp_path / "whole.safetensors")
    code, _, output = call("--decode", "whole.safetensors", "back.ckpt")
    assert code == 0
    assert "a whole checkpoint is in back.ckpt" in output
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert list(back) == list(checkpoint)
    assert back["loops"] == checkpoint["loops"]
    assert same(back["state_dict"]["fc.weight"], state_dict["fc.weight"])
    assert call("--decode", "whole.safetensors", "back.pt")[0] == 0
    assert list(torch.load(tmp_path / "back.pt", weights_only=True)) == list(state_dict)
    assert call("whole.safetensors", "out.safetensors", "density.fc=0.1")[0] == 0
    loaded = load_compressed(tmp_path / "out.safetensors")
    assert list(loaded) == list(state_dict)
    assert int(loaded["fc.weight"].count_nonzero()) == 40


def test_extra_state_and_plain_safetensors(call, tmp_path):
    weight = torch.randn(20, 20)
    torch.save({"m.weight": weight, "m._extra_state": {"a": [1, torch.ones(2)]}}, tmp_path / "extra.pt")
    assert call("extra.pt", "out.safetensors", "density.m=0.1")[0] == 0
    loaded = load_compressed(tmp_path / "out.safetensors")
    assert loaded["m._extra_state"]["a"][0] == 1
    assert call("--decode", "out.safetensors", "back.ckpt")[0] == 0
    assert list(torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"]) == ["m.weight", "m._extra_state"]
    save_file({"m.weight": weight}, tmp_path / "plain.safetensors")
    assert call("plain.safetensors", "out.safetensors", "density.m=0.1")[0] == 0
    assert int(load_compressed(tmp_path / "out.safetensors")["m.weight"].count_nonzero()) == 40


def test_tied_weights_stay_tied(call, tmp_path):
    weight = torch.randn(50, 40)
    torch.save({"a.weight": weight, "b.weight": weight, "c.weight": torch.randn(9, 9)}, tmp_path / "dense.pt")
    assert call("dense.pt", "out.safetensors", "density.b=0.1", "density.a=0.1")[0] == 0
    loaded = load_compressed(tmp_path / "out.safetensors")
    assert loaded["a.weight"] is loaded["b.weight"]
    assert int(loaded["a.weight"].count_nonzero()) == 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "squall-compress IN.ckpt OUT.safetensors"),
        (("dense.pt",), "where to write"),
        (("dense.pt", "x", "y"), "'y' is neither a setting nor"),
        (("dense.pt", "x", "densty.fc1=0.1"), "'densty.fc1=0.1' is neither"),
        (("none.pt", "x"), "none.pt: there is no such file"),
        (("dense.pt", "no/x"), "no/x: there is no such folder"),
        (("dense.pt", "x", "density.fc9=0.1"), "density.fc9: no layer is called so. There are: fc1, fc2, fc3"),
        (("dense.pt", "x", "bits.conv=8"), "bits.conv: no layer is called so"),
        (("dense.pt", "x", "density.fc=0"), "fc1: density=0 must be above 0"),
        (("dense.pt", "x", "density.fc3=1.5"), "fc3: density=1.5 must be above 0 and at most 1"),
        (("dense.pt", "x", "density.fc3=much"), "fc3: density=much must be a number"),
        (("dense.pt", "x", "bits.fc3=0"), "fc3: bits=0 must be from 1 to 16"),
        (("dense.pt", "x", "bits.fc3=4.5"), "fc3: bits=4.5 must be a whole number"),
        (("dense.pt", "x", "bits.fc3=true"), "fc3: bits=true must be a whole number"),
        (("dense.pt", "x", "density.fc3=0.1", "bits.fc3=8"), "fc3: bits=8 makes 256 centroids of 100 weights"),
        (("dense.pt", "x", "coder=zip"), "coder='zip' must be one of ans, huffman"),
        (("dense.pt", "x", "gap_bits=x"), "gap_bits=x must be a whole number from 1 to 12"),
        (("dense.pt", "x", "density=2"), "fc1: density=2 must be above 0"),
        (("empty.pt", "x"), "empty.pt can't be read as weights alone"),
        (("empty.safetensors", "x"), "empty.safetensors: it is no whole safetensors file"),
        (("legacy.pt", "x"), "legacy.pt can't be read as weights alone"),
        (("--decode", "cut.safetensors", "x", "density.fc1=0.5"), "--decode changes nothing in a file: leave density"),
        (("--decode", "cut.safetensors", "x", "coder=huffman", "bits=5"), "leave bits, coder out"),
        (("text.pt", "x"), "text.pt can't be read as weights alone"),
        (("list.pt", "x"), "list.pt is neither a Lightning checkpoint nor a state_dict"),
        (("code.pt", "x"), "code.pt can't be read as weights alone"),
        (("--decode", "dense.pt", "x"), "dense.pt: it is no whole safetensors file"),
        (("--decode", "cut.safetensors", "x"), "cut.safetensors: it is no whole safetensors file"),
        (("cut.safetensors", "x"), "cut.safetensors: it is no whole safetensors file"),
    ],
)
def test_what_is_wrong_is_one_clear_message(call, dense, tmp_path, arguments, words):
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "empty.safetensors").touch()
    torch.save(dense, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "legacy.pt").write_bytes((tmp_path / "legacy.pt").read_bytes()[:-3])
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"a": print}, tmp_path / "code.pt")
    save_compressed(dense, tmp_path / "cut.safetensors")
    with (tmp_path / "cut.safetensors").open("r+b") as file:
        file.truncate(1000)
    code, error, _ = call(*arguments)
    assert code == 1
    assert words in error
    assert "Traceback" not in error
    assert error.count("squall: ") == 1
    assert not (tmp_path / "x").exists()


def test_help(call):
    code, _, output = call("--help")
    assert code == 0
    assert "density" in output


LAYERS = ["net.conv1", "net.conv1_1", "net.conv10", "net.fc1", "net.fc10", "head.0.conv"]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"conv": 1}, {"net.conv1": 1, "net.conv1_1": 1, "net.conv10": 1, "head.0.conv": 1}),
        ({"conv1": 1}, {"net.conv1": 1, "net.conv1_1": 1}),
        ({"fc1": 1, "net": 2}, {"net.conv1": 2, "net.conv1_1": 2, "net.conv10": 2, "net.fc1": 1, "net.fc10": 2}),
        ({"fc": 2, "net.fc1": 3, "fc1": 1}, {"net.fc1": 3, "net.fc10": 2}),
        ({"0": 1}, {"head.0.conv": 1}),
        ({"conv": 2, "head.0": 1, "net": 3}, {**dict.fromkeys(LAYERS, 2), "net.fc1": 3, "net.fc10": 3}),
        ({"head.0.conv": 1}, {"head.0.conv": 1}),
    ],
)
def test_which_layers_a_name_means(settings, found):
    result = compress.find_layers(LAYERS, "density", settings)
    assert result == found


@pytest.mark.parametrize("name", ["onv", "fc2", "net.conv1.", "fc1|conv", ".*"])
def test_a_name_that_means_nothing(name):
    with pytest.raises(compress.UserError, match="no layer is called so"):
        compress.find_layers(LAYERS, "density", {name: 1})


def test_paths_with_signs_that_mean_something_to_hydra(call, dense, tmp_path):
    for name in ("a=b.pt", "it's, {here}.pt", "a b [1].pt"):
        (tmp_path / "dense.pt").rename(tmp_path / name)
        assert call(name, "out.safetensors")[0] == 0, name
        (tmp_path / name).rename(tmp_path / "dense.pt")
