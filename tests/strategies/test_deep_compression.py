"""DeepCompression in a stock fit: phases, files, runs that go on as if they had not been interrupted, ranks, errors."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import squall
from squall.sparsity import SET, CompressedCheckpointIO, CompressedFileError, DeepCompression, load_compressed
from tests.ranks import run
from tests.strategies.test_sparse import Batches, Net

QUIET: dict[str, Any] = {
    "logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
    "use_distributed_sampler": False, "accelerator": "cpu",
}  # fmt: skip
LAYERS = ("net.0.weight", "net.4.weight", "net.6.weight")


class Dropping(Net):
    """With dropout before its last two layers, and an optimizer that is named."""

    def __init__(self, optimizer: str = "momentum") -> None:
        super().__init__(optimizer)
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5),
            nn.Linear(8, 3),
        )  # fmt: skip


def algorithm(**options: Any) -> DeepCompression:
    """Two epochs of training, two rounds of one epoch each, and two epochs of shared values."""
    wanted = {"density": {"*": 0.3, "net.6": None}, "bits": 2, "train": 2, "retrain": 2, "share": 2, "num_rounds": 2}
    return DeepCompression(**{**wanted, **options})


def trainer_of(path: Path | str, sparsity: Any, inner: Any = "single", **options: Any) -> Trainer:
    strategy = squall.SparseStrategy(sparsity, inner=inner)
    return Trainer(strategy=strategy, default_root_dir=path, **{**QUIET, "devices": 1, "max_epochs": 6, **options})


def fit(path: Path | str, sparsity: Any = None, module: LightningModule | None = None, **options: Any) -> Any:
    torch.manual_seed(3)
    module = Dropping() if module is None else module
    trainer = trainer_of(path, algorithm() if sparsity is None else sparsity, **options)
    trainer.fit(module, Batches())
    return trainer, module


class Watch(Callback):
    """Notes after each batch which phase it is, how many weights live and how many values they have."""

    def __init__(self) -> None:
        self.phases: list[str] = []
        self.masks: list[dict[str, Tensor]] = []
        self.values: list[int] = []
        self.dropout: list[float] = []
        self.weights: list[Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        strategy: Any = trainer.strategy
        self.phases.append(strategy.training.phase.name)
        self.masks.append({name: mask.clone() for name, mask in strategy.masks.items()})
        weight = pl_module.get_parameter("net.4.weight").detach()
        self.values.append(len(weight[weight != 0].unique()))
        self.weights.append(weight.clone())
        self.dropout.append(next(m.p for m in pl_module.modules() if isinstance(m, nn.Dropout)) if isinstance(
            pl_module, Dropping) else 0.0)  # fmt: skip


# ------------------------------------------------------------------ phases


def test_phases_follow_each_other_at_the_borders_of_epochs(tmp_path: Path) -> None:
    watch = Watch()
    fit(tmp_path, callbacks=[watch])
    assert watch.phases == ["train"] * 8 + ["prune"] * 8 + ["share"] * 8
    live = [int(masks["net.4.weight"].sum()) for masks in watch.masks]
    first = round(0.3**0.5 * 512)
    assert live == [512] * 8 + [first] * 4 + [round(0.3 * 512)] * 12
    assert all(int(masks["net.6.weight"].sum()) == 24 for masks in watch.masks), "it has no density"
    for before, after in zip(watch.masks, watch.masks[1:], strict=False):
        assert all(not (after[name] & ~before[name]).any() for name in LAYERS)
    assert set(watch.values[16:]) == {4}
    assert min(watch.values[:16]) > 100
    assert not torch.equal(watch.weights[16], watch.weights[-1]), "values are trained"
    codes = [torch.unique(weight, return_inverse=True)[1] for weight in watch.weights[16:]]
    assert all(torch.equal(codes[0], other) for other in codes), "which weight has which value stays"


def test_dropout_is_less_where_weights_are_fewer_and_comes_back(tmp_path: Path) -> None:
    watch = Watch()
    _, module = fit(tmp_path, algorithm(density={"net.6": 0.25}, bits=1), callbacks=[watch])
    # D_r = D_o sqrt(C_r / C_o) of the layer that it feeds: 24 weights, then 12, then 6.
    assert watch.dropout == pytest.approx([0.5] * 8 + [0.5 * 0.5**0.5] * 4 + [0.25] * 12)
    assert module.net[5].p == 0.5
    watch = Watch()
    fit(tmp_path, algorithm(density={"net.6": 0.25}, bits=1, dropout=False), callbacks=[watch])
    assert set(watch.dropout) == {0.5}


def test_what_is_logged(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, logger=CSVLogger(tmp_path, name="", version=""), log_every_n_steps=1)
    lines = [line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines()]
    columns = {name: [row[index] for row in lines[1:] if row[index]] for index, name in enumerate(lines[0])}
    assert [float(value) for value in columns["compression/phase"]] == [0, 0, 1, 1, 2, 2]
    assert [float(value) for value in columns["compression/round"]] == [0, 0, 1, 2, 0, 0]
    assert [float(value) for value in columns["compression/lr_factor"]] == pytest.approx([1, 1, 0.1, 0.1, 0.1, 0.1])
    size = (tmp_path / "compressed.safetensors").stat().st_size
    assert [float(value) for value in columns["compression/file_bytes"]] == [size]
    assert float(columns["compression/rate"][0]) == pytest.approx(trainer.strategy.compression_report.rate, rel=1e-4)
    assert "compression/rate/net.4" in columns


@pytest.mark.parametrize("factors", [(0.1, 0.1), (0.0, 0.0)])
def test_rates_are_the_schedule_s_times_the_phase_s(tmp_path: Path, factors: tuple[float, float]) -> None:
    seen: list[float] = []
    rates: list[float] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    class Looking(Dropping):
        def configure_optimizers(self) -> Any:
            made = super().configure_optimizers()
            made[0][0].register_step_post_hook(lambda o, *args: seen.append(o.param_groups[0]["lr"]))
            return made

    watch = Watch()
    sparsity = algorithm(retrain_lr=factors[0], share_lr=factors[1])
    fit(tmp_path, sparsity, Looking(), callbacks=[Rates(), watch])
    decayed = [0.1 * 0.9 ** (step // 4) for step in range(24)]
    assert rates == pytest.approx(decayed), "between steps the rate is the user's"
    factor = [1.0] * 8 + [factors[0]] * 8 + [factors[1]] * 8
    assert seen == pytest.approx([rate * f for rate, f in zip(decayed, factor, strict=True)])
    still = torch.equal(watch.weights[12], watch.weights[15])
    assert still == (factors[0] == 0.0)


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("optimizer", ["momentum", "sgd", "adamw"])
def test_weights_share_values_bit_for_bit_after_any_step(tmp_path: Path, optimizer: str) -> None:
    watch = Watch()
    trainer, module = fit(tmp_path, module=Net(optimizer), callbacks=[watch])
    assert set(watch.values[16:]) == {4}
    for name, clusters in trainer.strategy.training.clusters.items():
        parameter = module.get_parameter(name)
        for value in [parameter, *trainer.optimizers[0].state[parameter].values()]:
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                for code in range(len(clusters)):
                    assert len(value[clusters.mask][clusters.codes == code].unique()) == 1, name


def test_the_file_is_the_stock_model(tmp_path: Path) -> None:
    trainer, module = fit(tmp_path)
    stock = Dropping()
    stock.load_state_dict(load_compressed(tmp_path / "compressed.safetensors"))
    x = torch.randn(5, 2, 6, 6)
    assert torch.equal(stock.eval().net(x), module.eval().net(x))
    assert trainer.strategy.compression_report.num_file_bytes == (tmp_path / "compressed.safetensors").stat().st_size


def test_where_the_file_goes(tmp_path: Path) -> None:
    fit(tmp_path / "a", algorithm(dirpath=str(tmp_path / "b" / "c"), filename="x.safetensors", coder="huffman"))
    assert [path.name for path in (tmp_path / "b" / "c").iterdir()] == ["x.safetensors"]
    fit(tmp_path / "d", algorithm(filename=None))
    assert not (tmp_path / "d").exists()


def test_a_training_that_ends_early_says_so_and_writes_what_there_is(tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.should_stop = trainer.current_epoch == 2

    with pytest.warns(UserWarning, match="'prune', which was to begin with epoch 3"):
        _, module = fit(tmp_path, callbacks=[Stop()])
    loaded = load_compressed(tmp_path / "compressed.safetensors")
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.items())


def test_by_sensitivity(tmp_path: Path) -> None:
    watch = Watch()
    fit(tmp_path, algorithm(density=None, sensitivity={"net.4": 0.7}, retrain_lr=0.0), callbacks=[watch])
    weight = watch.weights[7]
    kept = weight.abs() > 0.7 * weight.std(correction=0)
    assert torch.equal(watch.masks[8]["net.4.weight"], kept)
    again = kept & (weight.abs() > 0.7 * weight[kept].std(correction=0))
    assert torch.equal(watch.masks[12]["net.4.weight"], again)
    assert watch.masks[-1]["net.0.weight"].all()


def test_all_weights_below_the_threshold_keep_as_many_as_values(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, algorithm(density=None, sensitivity=50.0))
    assert [int(mask.sum()) for mask in trainer.strategy.masks.values()] == [4, 4, 4]


def test_averages_share_values_too(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=22)
    callbacks = [EMAWeightAveraging(decay=0.7), keep]
    _, module = fit(tmp_path, module=Net(), callbacks=callbacks, enable_checkpointing=True)
    saved = torch.load(tmp_path / "step=22.ckpt", weights_only=True)
    for state in (saved["state_dict"], module.state_dict(), load_compressed(tmp_path / "compressed.safetensors")):
        assert len(state["net.4.weight"].unique()) <= 5


# ------------------------------------------------------------------ going on


def _interrupted(path: str, inner: str, optimizer: str, at: int, num_ranks: int, compressed: bool) -> None:
    rank = int(os.environ.get("RANK", "0"))
    plugins = {"plugins": [CompressedCheckpointIO()]} if compressed else {}

    def once(ckpt_path: str | None, **more: Any) -> tuple[Any, Any, Any, Any]:
        torch.manual_seed(3)
        module: Any = Net(optimizer) if inner == "ddp" else Dropping(optimizer)
        trainer = trainer_of(path, algorithm(), inner, devices=num_ranks, **plugins, **more)
        # No checkpoint has the state of dropout's generator: every step begins with a seed of its own.
        module.on_train_batch_start = lambda *args: torch.manual_seed(trainer.global_step) and None
        trainer.fit(module, Batches(rank), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        strategy: Any = trainer.strategy
        state = trainer.optimizers[0].state_dict()
        return (
            module.state_dict(),
            strategy.training.state_dict(),
            state,
            load_compressed(f"{path}/compressed.safetensors"),
        )

    keep = ModelCheckpoint(dirpath=path, filename="{step}", every_n_train_steps=at, save_top_k=-1)
    if compressed:
        keep.FILE_EXTENSION = ".safetensors"
    straight = once(None, callbacks=[keep], enable_checkpointing=True)
    resumed = once(f"{path}/step={at}{keep.FILE_EXTENSION}")
    _equal(straight, resumed)


def _equal(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            _equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            _equal(mine, theirs, f"{where}/{index}")
    else:
        assert one == other, where


@pytest.mark.parametrize(
    ("at", "optimizer", "compressed"),
    [  # within, and at the end of, each phase and round
        *((at, "momentum", False) for at in (3, 8, 10, 12, 16, 18)), (18, "adamw", False),
        *((at, "momentum", True) for at in (3, 12, 18)), (21, "adamw", True),
    ],
)  # fmt: skip
def test_an_interrupted_run_is_an_uninterrupted_one(tmp_path: Path, at: int, optimizer: str, compressed: bool) -> None:
    _interrupted(str(tmp_path), "single", optimizer, at, 1, compressed)


@pytest.mark.parametrize(("at", "compressed"), [(10, False), (18, True)])
def test_an_interrupted_run_of_two_ranks_is_an_uninterrupted_one(tmp_path: Path, at: int, compressed: bool) -> None:
    run(2, _interrupted, str(tmp_path), "ddp", "momentum", at, 2, compressed, lightning=True)


def _apart(path: str) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    torch.manual_seed(100 + rank)
    module = Net()
    trainer = trainer_of(path, algorithm(), "ddp", devices=2)
    trainer.fit(module, Batches(rank))
    strategy: Any = trainer.strategy
    return {"weights": dict(module.named_parameters()), "state": strategy.training.state_dict(),
            "report": strategy.compression_report is not None}  # fmt: skip


def test_ranks_with_different_data_have_equal_masks_codes_and_weights(tmp_path: Path) -> None:
    first, second = run(2, _apart, str(tmp_path), lightning=True)
    assert (first.pop("report"), second.pop("report")) == (True, False)
    assert len(first["state"]["codes"]) == 3
    for one, other in zip(first["weights"].values(), second["weights"].values(), strict=True):
        assert torch.equal(one, other)
    _equal(first["state"], second["state"])


def _dense(path: Path, optimizer: str = "momentum") -> Net:
    dense = Net(optimizer)
    alone = Trainer(**QUIET, max_epochs=7, devices=1)
    alone.fit(dense, Batches())
    alone.save_checkpoint(path / "dense.ckpt")
    return dense


def test_a_dense_checkpoint_gives_its_weights_and_eats_no_epochs(tmp_path: Path) -> None:
    dense, watch = _dense(tmp_path), Watch()
    trainer = trainer_of(tmp_path, algorithm(), callbacks=[watch])
    trainer.fit(module := Net(), Batches(), ckpt_path=tmp_path / "dense.ckpt", weights_only=True)
    # Four epochs of pruning, of which the last round has the two that the first phase would have had.
    assert watch.phases == ["prune"] * 16 + ["share"] * 8
    assert [int(masks["net.4.weight"].sum()) for masks in watch.masks] == [280] * 4 + [154] * 20
    weight = dense.net[4].weight.detach().abs()
    mask = watch.masks[0]["net.4.weight"]
    assert weight[mask].min() >= weight[~mask].max()
    assert trainer.global_step == 24
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 6, "the schedule is a new one"
    assert len(module.net[4].weight.unique()) == 5


def test_weights_alone_are_a_dense_checkpoint_too(tmp_path: Path) -> None:
    dense = _dense(tmp_path)
    torch.save({"state_dict": dense.state_dict(), "pytorch-lightning_version": "2.6.0"}, tmp_path / "weights.ckpt")
    squall.sparsity.save_compressed(dense.state_dict(), tmp_path / "weights.safetensors")
    for name, more in (("weights.ckpt", {}), ("weights.safetensors", {"plugins": CompressedCheckpointIO()})):
        watch = Watch()
        trainer = trainer_of(tmp_path, algorithm(), callbacks=[watch], **more)
        trainer.fit(Net(), Batches(), ckpt_path=tmp_path / name, weights_only=True)
        assert watch.phases[0] == "prune"


def test_a_second_fit_goes_on_with_shared_values(tmp_path: Path) -> None:
    trainer, module = fit(tmp_path, module=Net())
    values = len(module.net[4].weight.unique())
    trainer.fit_loop.max_epochs = 7
    trainer.fit(module, Batches())
    assert trainer.strategy.training.phase.name == "share"
    assert len(module.net[4].weight.unique()) == values


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "trainer_options", "message"),
    [
        ({"density": {"nope": 0.1}}, {}, r"density=.*no layer is called 'nope'"),
        ({"bits": {"*": 3, "nope": 5}}, {}, r"bits=.*no layer is called 'nope'"),
        ({"sensitivity": {"nope": 1.0}}, {}, r"sensitivity=.*no layer is called 'nope'"),
        ({"bits": 5}, {}, r"bits=5 makes 32 shared values of the 22 weights that net.0 keeps"),
        ({"train": 3}, {}, r"max_epochs=7 or more"),
        ({}, {"max_epochs": 5}, r"max_epochs=6 or more"),
        ({}, {"max_epochs": -1, "max_steps": 100}, r"give the Trainer max_epochs"),
        ({}, {"max_steps": 16}, r"max_steps=16 ends the training before its last phase"),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_first_batch(
    tmp_path: Path, options: Any, trainer_options: Any, message: str
) -> None:
    class Untouched(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise AssertionError("a batch was run")

    with pytest.raises((ValueError, MisconfigurationException), match=message):
        trainer_of(tmp_path, algorithm(**options), **trainer_options).fit(Untouched(), Batches())


class Extra(Net):
    """What a module may have beside tensors: an extra state."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.extra, self.num_batches = extra, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.num_batches += 1
        return super().training_step(batch, batch_idx)

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_extra_state_is_in_the_file(tmp_path: Path) -> None:
    module = Extra({"scale": [1.5, torch.ones(2)]})
    trainer, _ = fit(tmp_path, module=module)
    stock = Extra(None)
    stock.load_state_dict(load_compressed(tmp_path / "compressed.safetensors"))
    assert stock.extra["scale"][0] == 1.5
    assert torch.equal(stock.net[4].weight, module.net[4].weight)
    trainer.test(tested := Extra(None), Batches(), ckpt_path=tmp_path / "compressed.safetensors", verbose=False)
    assert tested.extra["scale"][0] == 1.5
    again = trainer_of(tmp_path, algorithm())
    again.fit(Extra(None), Batches(), ckpt_path=tmp_path / "compressed.safetensors")
    assert again.global_step == 24


@pytest.mark.parametrize(
    ("extra", "words"),
    [({"function": max}, r"can't hold the module: state_dict\['_extra_state/function'\] is a builtins"),
     (torch.eye(3).to_sparse(), r"state_dict\['_extra_state'\] is a torch.sparse_coo")],
)  # fmt: skip
def test_what_the_file_cannot_hold_is_named_before_the_first_batch(tmp_path: Path, extra: Any, words: str) -> None:
    module = Extra(extra)
    with pytest.raises(MisconfigurationException, match=words):
        fit(tmp_path, module=module)
    assert module.num_batches == 0


def test_data_that_does_not_say_how_long_it_is(tmp_path: Path) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(Batches())

    trainer = trainer_of(tmp_path, algorithm(), max_steps=100)
    trainer.fit(Net(), DataLoader(Endless(), batch_size=None))
    assert trainer.global_step == 24


def test_another_density_than_the_checkpoint_s_is_refused(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    other = trainer_of(tmp_path, algorithm(density=0.2))
    with pytest.raises(MisconfigurationException, match=r"density=.*0\.3.* and this one has density=.*0\.2"):
        other.fit(Dropping(), Batches(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)


def test_numbers_of_numpy_are_numbers() -> None:
    made = algorithm(density={"*": np.float32(0.5)}, bits=np.int64(3), retrain=np.int64(2), num_rounds=np.int64(2))
    assert [phase.epoch for phase in made.plan(6, False)] == [0, 2, 3, 4]
    assert squall.sparsity.SparseMomentum(density=np.float32(0.5), update_every=np.int64(3)).density == 0.5


def test_complex_weights_share_no_values() -> None:
    weights = {"a.weight": nn.Parameter(torch.randn(9, 9, dtype=torch.complex64))}
    with pytest.raises(ValueError, match=r"bits=2: a has complex weights"):
        algorithm(density=0.5).settle(weights)


def test_a_checkpoint_of_another_algorithm_is_refused(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, SET(density=0.5), Net())
    trainer.save_checkpoint(tmp_path / "set.ckpt")
    with pytest.raises(ValueError, match="of another sparse training"):
        trainer_of(tmp_path, algorithm(), max_epochs=9).fit(Net(), Batches(), ckpt_path=tmp_path / "set.ckpt")


def test_a_checkpoint_whose_phases_are_longer_is_refused(tmp_path: Path) -> None:
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    fit(tmp_path, callbacks=[keep], enable_checkpointing=True)
    with pytest.raises(ValueError, match=r"last phase begins with epoch 4.*max_epochs=5"):
        trainer_of(tmp_path, algorithm(train=0, retrain=2, share=1), max_epochs=4).fit(
            Dropping(), Batches(), ckpt_path=tmp_path / "step=4.ckpt"
        )


def test_a_fast_run_goes_through_all_phases_and_writes_nothing(tmp_path: Path) -> None:
    watch = Watch()
    fit(tmp_path / "x", fast_dev_run=2, callbacks=[watch])
    assert watch.phases == ["share"] * 2
    assert not (tmp_path / "x").exists()


def test_a_training_that_diverged_says_so(tmp_path: Path) -> None:
    class Diverging(Net):
        def on_train_batch_end(self, *args: Any) -> None:
            self.net[4].weight.data[0, 0] = float("nan")

    with pytest.raises(ValueError, match=r"A weight of net.\d isn't finite"):
        fit(tmp_path, module=Diverging())


# ------------------------------------------------------------------ checkpoints without pickle


def test_what_needs_pickle_is_named(tmp_path: Path) -> None:
    class Naming(Net):
        def __init__(self, function: Callable[..., Any]) -> None:
            super().__init__()
            self.save_hyperparameters()

    trainer = trainer_of(tmp_path, algorithm(), plugins=CompressedCheckpointIO(), max_epochs=6)
    trainer.fit(Naming(max), Batches())
    with pytest.raises(ValueError, match=r"hyper_parameters/function'\] is a builtins.builtin_function"):
        trainer.save_checkpoint(tmp_path / "x.safetensors")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer, _ = fit(tmp_path, plugins=CompressedCheckpointIO())
    trainer.save_checkpoint(tmp_path / "x.safetensors")
    data = bytearray((tmp_path / "x.safetensors").read_bytes())
    assert b"pickle" not in data
    data[len(data) // 2] ^= 1
    (tmp_path / "y.safetensors").write_bytes(data)
    with pytest.raises(CompressedFileError, match="checksum"):
        trainer_of(tmp_path, algorithm(), plugins=CompressedCheckpointIO()).fit(
            Net(), Batches(), ckpt_path=tmp_path / "y.safetensors"
        )
