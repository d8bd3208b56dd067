"""The file: a stock state_dict comes back whole, and anything that isn't one is one clear error."""

from __future__ import annotations

import base64
import json
import os
import stat
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from squall.models import LeNet300
from squall.sparsity import CompressedFileError, load_compressed, save_compressed
from squall.sparsity.coding import fields, file, streams
from squall.sparsity.coding.fields import number
from tests.sparsity.tensors import same
from tests.sparsity.tensors import tensors as any_tensor


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compressed")


@pytest.mark.parametrize("coder", streams.CODERS)
@given(state_dict=st.dictionaries(st.text(max_size=8), any_tensor(), max_size=5))
@settings(max_examples=60, deadline=None)
def test_round_trip(folder, coder, state_dict):
    path = folder / f"{coder}.safetensors"
    report = save_compressed(state_dict, path, coder=coder)
    loaded = load_compressed(path)
    assert list(loaded) == list(state_dict)
    assert all(same(loaded[name], state_dict[name]) for name in state_dict)
    assert report.num_file_bytes == path.stat().st_size
    assert report.num_dense_bytes == sum(tensor.nbytes for tensor in state_dict.values())
    assert os.listdir(folder) == [path.name] or len(os.listdir(folder)) <= 2  # no draft is left


def pruned(seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 9, (40, 50), generator=generator).float()
    return torch.where(torch.rand(40, 50, generator=generator) < 0.2, values, 0.0)


@pytest.fixture
def saved(tmp_path):
    """A small compressed file, and its state_dict."""
    state_dict = {"b": torch.randn(7), "a": pruned(), "c": torch.arange(4)}
    path = tmp_path / "x.safetensors"
    save_compressed(state_dict, path)
    return path, state_dict


def test_a_stock_module_loads_it(tmp_path):
    net = LeNet300(num_classes=10, image_size=28, in_channels=1)
    with torch.no_grad():
        net.fc1.weight.masked_fill_(torch.rand_like(net.fc1.weight) > 0.1, 0)
    save_compressed(net.state_dict(), tmp_path / "x.safetensors")
    other = LeNet300(num_classes=10, image_size=28, in_channels=1)
    other.load_state_dict(load_compressed(tmp_path / "x.safetensors"))
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(net(images), other(images))


def test_tied_tensors_are_stored_once_and_are_one_again(tmp_path):
    weight = torch.randn(100, 100)
    state_dict = {"in": weight, "out": weight, "turned": weight.t(), "part": weight[:50], "copy": weight.clone()}
    report = save_compressed(state_dict, tmp_path / "x.safetensors")
    loaded = load_compressed(tmp_path / "x.safetensors")
    assert loaded["in"] is loaded["out"]
    assert all(same(loaded[name], state_dict[name]) for name in state_dict)
    assert [figures.name for figures in report.tensors] == ["in", "turned", "part", "copy"]
    assert report.num_file_bytes < 3.6 * weight.nbytes


def test_a_file_is_the_same_whenever_it_is_written(tmp_path, saved):
    path, state_dict = saved
    save_compressed(state_dict, tmp_path / "y.safetensors")
    assert path.read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_what_is_stored_as_it_is_any_safetensors_reader_reads(saved):
    path, state_dict = saved
    assert same(load_file(path)["b"], state_dict["b"])


def test_what_is_loaded_does_not_depend_on_the_file(saved):
    path, state_dict = saved
    loaded = load_compressed(path)
    with path.open("r+b") as open_file:
        open_file.write(bytes(path.stat().st_size))
    assert all(same(loaded[name], state_dict[name]) for name in state_dict)


def test_a_file_is_replaced_when_the_new_one_is_whole(saved, tmp_path, monkeypatch):
    path, _ = saved
    before = path.read_bytes()
    with pytest.raises(ValueError, match="extra"):
        save_compressed({"a": pruned(), "extra": {"text"}}, path)
    with monkeypatch.context() as full_disk:
        full_disk.setattr(file, "_checksum", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save_compressed({"a": pruned(1)}, path)
    assert path.read_bytes() == before
    save_compressed(load_compressed(path), path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask  # as any file, though drafts are private


@pytest.mark.parametrize(
    ("state_dict", "options", "words"),
    [
        ({"a": print}, {}, r"state_dict\['a'\] is a builtins.builtin"),
        ({"a": {"b": [torch.zeros(3).to_sparse()]}}, {}, r"state_dict\['a/b/0'\] is a torch.sparse_coo"),
        ({"a": torch.zeros([1] * 65)}, {}, "'a'.* has 65 dimensions"),
        ({1: torch.zeros(3)}, {}, r"state_dict\[1\].* must be a string"),
        ({"a\ud800": torch.zeros(3)}, {}, "surrogate.* rename"),
        ({"__metadata__": torch.zeros(3)}, {}, "can't be called '__metadata__'.* rename"),
        ({"squall.tree": torch.zeros(3)}, {}, "'squall.tree'.* rename"),
        ({"squall.state": torch.zeros(3)}, {}, "'squall.state'.* rename"),
        ({"a": torch.zeros(3).to_sparse()}, {}, "sparse"),
        ({"a": torch.zeros(3, device="meta")}, {}, "meta"),
        ({"squall.padding": torch.zeros(3)}, {}, "rename"),
        ({}, {"coder": "zip"}, "coder='zip'"),
        ({}, {"gap_bits": 0}, "gap_bits=0"),
        ({}, {"gap_bits": 13}, "gap_bits=13"),
        ({}, {"gap_bits": "x"}, "gap_bits=x must be a whole number"),
    ],
)
def test_what_can_t_be_saved(tmp_path, state_dict, options, words):
    with pytest.raises(ValueError, match=words):
        save_compressed(state_dict, tmp_path / "x.safetensors", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex32, torch.float8_e8m0fnu])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (40, 50)])
def test_data_types_that_safetensors_has_not(tmp_path, dtype, shape):
    state_dict = {"a": torch.randn(shape).to(dtype), "b": torch.zeros(shape, dtype=torch.uint8).view(torch.uint8)}
    save_compressed(state_dict, tmp_path / "x.safetensors")
    loaded = load_compressed(tmp_path / "x.safetensors")
    assert all(same(loaded[name], state_dict[name]) for name in state_dict)


def test_what_is_no_tensor_comes_back_too(tmp_path):
    extra = {"scale": [torch.arange(3.0), 1.5, None], 2: (b"x", "y")}
    state_dict = {"a": pruned(1), "m._extra_state": extra, "b": torch.ones(2), "squall.tied": None}
    state_dict["squall.tied"] = state_dict["a"]
    report = save_compressed(state_dict, tmp_path / "x.safetensors")
    loaded = load_compressed(tmp_path / "x.safetensors")
    assert list(loaded) == list(state_dict)
    assert same(loaded["a"], state_dict["a"])
    assert loaded["squall.tied"] is loaded["a"]
    assert torch.equal(loaded["m._extra_state"]["scale"][0], extra["scale"][0])
    assert loaded["m._extra_state"]["scale"][1:] == extra["scale"][1:]
    assert loaded["m._extra_state"][2] == (b"x", "y")
    assert report.num_file_bytes == (tmp_path / "x.safetensors").stat().st_size


# Files that are none.


def seal(path):
    """Compute the checksum again, as whoever means harm would."""
    data = np.fromfile(path, np.uint8)
    place, _ = file._find_checksum(data)
    data[place : place + 32] = np.frombuffer(file._checksum([data], place).encode(), np.uint8)
    data.tofile(path)


def rewrite(path, kinds=None, entries=None, metadata=None):
    """Write a file with other contents and a right checksum."""
    with safe_open(path, "pt") as opened:
        stored = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        old = opened.metadata()["squall"]
    table = json.dumps(kinds) if kinds is not None else old.partition("tensors=")[2]
    text = metadata or f"version={file.VERSION} checksum={'0' * 32} tensors={table}"
    save_file({**stored, **(entries or {})}, path, {"squall": text})
    if "checksum=" in text:
        seal(path)


def test_a_sealed_file_is_read(saved):
    path, state_dict = saved
    rewrite(path)
    assert all(same(load_compressed(path)[name], state_dict[name]) for name in state_dict)


@pytest.mark.parametrize("position", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_a_bit_that_flipped(saved, position):
    path, _ = saved
    data = bytearray(path.read_bytes())
    data[int(position * (len(data) - 1))] ^= 4
    path.write_bytes(data)
    with pytest.raises(CompressedFileError, match=r"x\.safetensors: "):
        load_compressed(path)


def test_a_bit_that_flipped_where_any_bits_will_do(saved):
    path, state_dict = saved
    data = path.read_bytes()
    weights = state_dict["b"].numpy().tobytes()
    assert weights in data
    path.write_bytes(data.replace(weights, bytes([weights[0] ^ 1]) + weights[1:]))
    with pytest.raises(CompressedFileError, match="checksum is wrong"):
        load_compressed(path)


# The same tensors.
VERSIONS = {
    1: (
        "*Z=?k00000dm>+7ZDn*}WMOn+Utc0Rdm?jjbzy95B03^=WpZ<AZ*Dy?AY*7{V{3DDZ9O?OV>n?rF=H_?G&DFgV`4L7HaIvkHa0Xe"
        "IW{n2V__h4Wo~nCa&tX<Tq1W|B04cFTq0szB04aAB7H0(Vj?<wB4l)VaAhJoB1SVZA}k_vXkl<=B05_#T`VGGVRT_%Z)Rq5Wpr~Q"
        "I$JO-I9+`#B6lJ>dm?0Xd2nSSIwDm#A}k_vXkl<=B05_!H8ou<B4lB7VP9`%W^-k9b0RuhI4m(XGhKas004kL0000$00Jm71Hb|U"
        "009U9+uPgQ+uQ#RO$SKZzv~A=ePdm3r~iZ;b_5G<V(Cq@`7{F&V=p1~>WF_xpy3p=^xHH2X=YnQ*zp8LAwNb00{{SkJ^%o~KL7v#"
        "zySm8|Mw3s6$*2Za?haXG_pYFcac1E+EpEIy)7l;1D1~p&+$1!OXLi4MPgfLN!tlV2}-O&F5T`9MZ>r+0000"
    ),
    2: (
        "*Z=?k00000dm>+7ZDn*}WMOn+Utc0Rdm?jjbzy95B03^=WpZ<AZ*Dy@AY*7{V{3DDZ9QQ&Wo2SFGBjm2I5;$6Gcq<eH8?h5Gchn>GcjQ"
        ">F=HTfWo~nCa&tX<Tq1W|B04cFTq0szB04aAB7H0(Vj?<wB4l)VaAhJoB1SVZA}k_vXkl<=B05_#T`VGGVRT_%Z)Rq5Wpr~QI$JO-I9+"
        "`#B6lJ>dm?0Xd2nSSIwDm#A}k_vXkl<=B05_!H8ou<B4lB7VP9`%W^-k9b0RuhI4m(XGhKas004kL0000$00Jm71Hb|U009U9+uPgQ+u"
        "Q#RO$SKZzv~A=ePdm3r~iZ;b_5G<V(Cq@`7{F&V=p1~>WF_xpy3p=^xHH2X=YnQ*zp8LAwNb00{{SkJ^%o~KL7v#zySm8|Mw3s6$*2Za"
        "?haXG_pYFcac1E+EpEIy)7l;1D1~p&+$1!OXLi4MPgfLN!tlV2}-O&F5T`9MZ>r+0000"
    ),
}


@pytest.mark.parametrize("version", VERSIONS)
def test_files_of_older_versions_are_read_for_ever(tmp_path, version):
    weight = torch.zeros(40, 50)
    for start, step, value in ((0, 7, 1.5), (0, 21, -2.0), (3, 50, 0.25)):
        weight.view(-1)[start::step] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(base64.b85decode(VERSIONS[version]))
    loaded = load_compressed(path)
    assert torch.equal(loaded["w"], weight)
    assert loaded["b"].tolist() == [1.0, 2.0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CompressedFileError, match="checksum is wrong"):
        load_compressed(path)


def test_another_version(saved):
    path, _ = saved
    rewrite(path, metadata="version=4 and who knows what")
    with pytest.raises(CompressedFileError, match=r"has version 4 .* reads version 3 and older"):
        load_compressed(path)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ("", "not those of a compressed file"),
        ("version=x", "not those"),
        ("version=3 tensors={}", "no checksum"),
        ("version=3 checksum=" + "0" * 32, "table of tensors"),
        ("version=3 checksum=" + "0" * 32 + " tensors=[]", "table of tensors"),
        ("version=3 checksum=" + "0" * 32 + " tensors=" + "[" * 100_000, "table of tensors"),
    ],
)
def test_other_metadata(saved, metadata, words):
    path, _ = saved
    rewrite(path, metadata=metadata or "x")
    with pytest.raises(CompressedFileError, match=words):
        load_compressed(path)


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ({"a": 1, "b": 0}, "'c' is in no table"),
        ({"a": 1, "b": 0, "c": 0, "d": 0}, "'d' is missing"),
        ({"a": 1, "b": 0, "c": "d"}, "'c' is tied to 'd', which isn't stored"),
        ({"a": 1, "b": "c", "c": "b"}, "tied to"),
        ({"a": 1, "b": 0, "c": 2}, "'c' is of a kind"),
        ({"a": 1, "b": 0, "c": True}, "'c' is of a kind"),
        ({"a": 1, "b": 0, "c": [0]}, "'c' is of a kind"),
        ({"a": 1, "b": 1, "c": 0}, "'b': its code is no row of bytes"),
    ],
)
def test_tables_that_lie(saved, kinds, words):
    path, _ = saved
    rewrite(path, kinds)
    with pytest.raises(CompressedFileError, match=words):
        load_compressed(path)


def test_an_error_names_the_tensor(saved):
    path, _ = saved
    rewrite(path, entries={"a": torch.tensor([0, 1, 8, 2, 0], dtype=torch.uint8)})
    with pytest.raises(CompressedFileError, match=r"x\.safetensors: tensor 'a': its codebook is empty\."):
        load_compressed(path)


def test_a_truth_value_that_is_neither(saved):
    path, _ = saved
    rewrite(path, entries={"b": torch.ones(50, dtype=torch.bool)})
    data = path.read_bytes()
    assert data.count(bytes(50 * [1])) == 1
    path.write_bytes(data.replace(bytes(50 * [1]), bytes(50 * [2])))
    seal(path)
    with pytest.raises(CompressedFileError, match="tensor 'b': a truth value"):
        load_compressed(path)


def test_no_file_of_ours(tmp_path):
    path = tmp_path / "x.safetensors"
    for write in (
        lambda: path.write_bytes(b""),
        lambda: path.write_bytes(b"PK\3\4" + bytes(100)),
        lambda: path.write_bytes(bytes(8)),
        lambda: save_file({"a": torch.zeros(3)}, path),
        lambda: torch.save({"a": torch.zeros(3)}, path),
    ):
        write()
        with pytest.raises(CompressedFileError):
            load_compressed(path)
    with pytest.raises(FileNotFoundError):
        load_compressed(tmp_path / "none")
    with pytest.raises(OSError, match="directory"):
        load_compressed(tmp_path)


# A file that says more than it holds.


def claim(saved, *numbers, body=b""):
    """Put a tensor that claims what it likes in the place of a."""
    path, _ = saved
    rewrite(path, entries={"a": torch.frombuffer(bytearray(b"".join(map(number, numbers)) + body), dtype=torch.uint8)})
    return path


@pytest.mark.parametrize(
    "numbers",
    [
        (0, 1, 1_000_000_000, 2, 1),  # all of one value
        (0, 1, 1_000_000_000, 1, 0, 1, 0),  # all zero
        (0, 1, 1_000_000_000, 1, 1_000_000_000, 1, 0, 0, 1),  # weights without bytes
        (0, 1, 1_000_000_000, 2, 2),
        (1, 3, 1 << 40, 1 << 40, 1 << 40, 2, 1),
    ],
)
def test_a_thousand_million_weights(saved, numbers):
    path = claim(saved, *numbers, body=bytes(64))
    begin = time.perf_counter()
    with pytest.raises(CompressedFileError, match=r"tensor 'a': .* bytes can't hold"):
        load_compressed(path)
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize(
    ("layout", "per_byte", "words"),
    [
        (7, 32, "symbols are announced"),  # positions are one symbol, so often
        (2, 63, "symbols are announced, and"),  # more than a file may have
        (2, 15, "doesn't end where its symbols do"),  # as many as it may have
    ],
)
def test_a_good_checksum_over_symbols_that_nobody_has_written(saved, layout, per_byte, words):
    num_bytes = 1 << 20
    num = per_byte * num_bytes // 8 * 8
    noise = np.random.default_rng(0).integers(1, 1 << 32, num_bytes // 4, dtype=np.uint32).astype("<u4").tobytes()
    body = number(layout) + (b"".join(map(number, (num, 1, 0, 0, 1))) if layout & 1 else b"")
    body += number(2) + np.array([1, 2], "<u4").tobytes()
    body += b"".join(map(number, (1, 2))) + bytes([200, 1]) + number(num_bytes // 4) + noise
    path = claim(saved, 0, 2, num // 8, 8, body=body)
    begin = time.process_time()
    with pytest.raises(CompressedFileError, match=words):
        load_compressed(path)
    assert time.process_time() - begin < 1


def test_all_streams_of_a_file_have_one_budget(tmp_path, monkeypatch):
    """Each of these tensors may be in a file, and so many of them may not."""
    monkeypatch.setattr(fields, "FREE_SYMBOLS", 3000)
    mask = torch.zeros(4000, dtype=torch.bool)
    mask[1000:2000] = True
    path = tmp_path / "x.safetensors"
    save_compressed({"a": mask}, path)
    assert same(load_compressed(path)["a"], mask)
    with safe_open(path, "pt") as opened:
        payload = opened.get_tensor("a").clone()
    kinds = dict.fromkeys(["a", *map(str, range(100))], 1)
    rewrite(path, kinds, {name: payload.clone() for name in kinds})
    monkeypatch.setattr(fields, "MAX_SYMBOLS_PER_BYTE", 1)
    with pytest.raises(CompressedFileError, match=r"symbols are announced, and .* bytes may have"):
        load_compressed(path)


@pytest.mark.parametrize("coder", streams.CODERS)
def test_a_writer_keeps_to_what_a_reader_takes(tmp_path, coder):
    """Clusters of weights take next to no bytes a symbol; very few weights take many symbols each."""
    mask = torch.zeros(300, 10_000, dtype=torch.bool)
    mask[:, 2000:9000] = True
    mask[torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 1e-3] ^= True
    few = torch.zeros(3_000_000)
    few[torch.randperm(3_000_000, generator=torch.Generator().manual_seed(0))[:300]] = 1.5
    state_dict = {"mask": mask, "few": few, "ones": torch.ones(1 << 20)}
    report = save_compressed(state_dict, tmp_path / "x.safetensors", coder=coder)
    loaded = load_compressed(tmp_path / "x.safetensors")
    assert all(same(loaded[name], state_dict[name]) for name in state_dict)
    assert report.num_file_bytes < 300_000


def test_many_tensors_that_claim_a_little(tmp_path):
    path = tmp_path / "x.safetensors"
    save_compressed({f"{i}": torch.zeros(1 << 20, dtype=torch.uint8) for i in range(12)}, path)
    assert len(load_compressed(path)) == 12
    kinds = {f"{i}": 1 for i in range(20)}
    with safe_open(path, "pt") as opened:
        payload = opened.get_tensor("0").clone()
    rewrite(path, kinds, {name: payload.clone() for name in kinds})
    with pytest.raises(CompressedFileError, match="can't hold the 17,825,792 that are claimed"):
        load_compressed(path)


def test_a_state_dict_of_zeros_is_as_large_as_a_reader_wants_it(tmp_path):
    path = tmp_path / "x.safetensors"
    state_dict = {"a": torch.zeros(10_000_000), "b": torch.ones(3)}
    report = save_compressed(state_dict, path)
    assert 40_000_000 / file.MAX_EXPANSION <= report.num_file_bytes < 40_000_000 / file.MAX_EXPANSION + 1000
    loaded = load_compressed(path)
    assert list(loaded) == ["a", "b"]
    assert all(same(loaded[name], state_dict[name]) for name in state_dict)
