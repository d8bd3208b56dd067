"""Every file of the tree composes and makes what it says; every experiment runs a batch."""

from pathlib import Path

import hydra
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from omegaconf import OmegaConf, open_dict

from squall.conf import main as command
from tests.models.test_data_modules import write_fashion

TREE = Path(command.__file__).parent


def options(group):
    return sorted(path.stem for path in (TREE / group).glob("*.yaml"))


@pytest.fixture
def tree(tmp_path):
    """Compose a configuration as ``squall`` would, its output folder in `tmp_path`."""
    with initialize_config_module("squall.conf", version_base="1.3"):

        def composed(*overrides):
            where = f"hydra.run.dir={tmp_path}"
            cfg = compose("squall", [where, *overrides], return_hydra_config=True)
            with open_dict(cfg):
                cfg.hydra.runtime.output_dir = str(tmp_path)
            HydraConfig.instance().set_config(cfg)
            with open_dict(cfg):
                del cfg["hydra"]
            return cfg

        yield composed
    HydraConfig.instance().cfg = None


class SmallData:
    num_classes, num_channels, image_size = 4, 1, 28


def test_the_groups_are_those_that_users_know():
    names = {path.name for path in TREE.iterdir() if path.is_dir() and any(path.glob("*.yaml"))}
    assert names >= {"strategy", "model", "data", "trainer", "callbacks", "logger", "experiment"}
    assert options("strategy") == [
        "auto", "column_parallel", "ddp", "deep_compression", "downpour", "hogwild", "hybrid_parallel", "rigl",
        "sandblaster", "set", "single", "sparse_momentum", "spatial_parallel", "static_mask",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in options("strategy") if name != "auto"])
def test_strategies(tree, name):
    cfg = tree(f"strategy={name}")
    assert isinstance(hydra.utils.instantiate(cfg.strategy), Strategy)
    for key, value in cfg.strategy.items():  # literal defaults: what a file says is what a reader sees
        assert not OmegaConf.is_interpolation(cfg.strategy, key), (key, value)


@pytest.mark.parametrize("name", options("model"))
def test_models(tree, name):
    cfg = tree(f"model={name}")
    for key in ("num_classes", "in_channels", "image_size"):
        assert cfg.model.model[key] is None
    command.fill_from_data(cfg.model, SmallData())
    command.choose_optimizer(cfg)
    assert cfg.model.model.num_classes == 4
    if name == "alexnet_2012":
        cfg.model.model.width = 0.05  # sixty million weights take their time to draw
    module = hydra.utils.instantiate(cfg.model).eval()
    with torch.no_grad():
        assert module(torch.zeros(2, 1, 28, 28)).shape == (2, 4)


@pytest.mark.parametrize("name", options("data"))
def test_data(tree, tmp_path, name):
    where = [f"data.root={tmp_path}"] if name == "image_folder" else []
    if name == "image_folder":
        for part in ("train", "val"):
            for label in ("cat", "dog"):
                (tmp_path / part / label).mkdir(parents=True)
    datamodule = hydra.utils.instantiate(tree(f"data={name}", *where).data)
    assert {"num_classes", "num_channels", "image_size"} <= set(dir(datamodule))


@pytest.mark.parametrize("name", options("callbacks"))
def test_callbacks(tree, name):
    cfg = tree(f"callbacks={name}")
    made = command.instantiate_all(cfg.callbacks)
    assert all(isinstance(callback, Callback) for callback in made)
    assert len(made) == len(cfg.callbacks)


@pytest.mark.parametrize("name", options("logger"))
def test_loggers(tree, name):
    made = command.instantiate_all(tree(f"logger={name}").logger)
    assert all(isinstance(logger, Logger) for logger in made)
    assert len(made) == {"default": 2, "none": 0}.get(name, 1)


@pytest.mark.parametrize("name", options("trainer"))
def test_trainers(tree, name):
    cfg = tree(f"trainer={name}", "trainer.devices=1")
    assert isinstance(hydra.utils.instantiate(cfg.trainer, logger=False, enable_checkpointing=False), Trainer)


@pytest.mark.parametrize(
    ("overrides", "num"),
    [
        (["strategy=single"], 1),
        (["strategy=single", "trainer.devices=1"], 1),
        (["strategy=ddp"], 2),
        (["strategy=sparse_momentum"], 1),
        (["strategy=sparse_momentum", "strategy.inner=ddp"], 2),
        (["strategy=ddp", "trainer.devices=3"], 3),
        (["strategy=column_parallel"], 2),
        (["strategy=hybrid_parallel"], 2),
        (["strategy.num_columns=3"], 3),
        (["experiment=alexnet_two_replicas"], 4),
        (["strategy=downpour"], 2),
        (["strategy=downpour", "strategy.num_columns=2"], 4),
    ],
)
def test_number_of_processes(tree, overrides, num):
    assert command.num_devices(tree(*overrides)) == num


def test_several_processes_of_a_single_device_are_refused(tree):
    with pytest.raises(command.UserError, match=r"strategy=ddp"):
        command.num_devices(tree("strategy=single", "trainer.devices=2"))


def test_several_processes_of_a_sparse_single_device_are_refused(tree):
    with pytest.raises(command.UserError, match=r"strategy.inner=ddp"):
        command.num_devices(tree("strategy=rigl", "trainer.devices=2"))


def write_images(root):
    from PIL import Image

    for part in ("train", "val"):
        for number, label in enumerate(("cat", "dog")):
            (root / part / label).mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (40, 36), (60 * number, 20 * index, 90)).save(root / part / label / f"{index}.png")


@pytest.mark.parametrize("name", options("experiment"))
def test_experiments_run_a_batch(tree, tmp_path, name):
    write_images(tmp_path / "images")
    small = ["strategy=single", "~strategy.num_columns", "~strategy.data_parallel_size"]
    overrides = [f"experiment={name}", "trainer.fast_dev_run=true", "callbacks=none", "logger=none"]
    cfg = tree(*overrides)
    needs_folder = str(cfg.data.get("_target_", "")).endswith("ImageFolderDataModule")
    if str(cfg.data.get("_target_", "")).endswith("FashionMNISTDataModule"):
        write_fashion(tmp_path / "fashion", num_train=400)
        overrides += [f"data.root={tmp_path / 'fashion'}", "data.val_size=100"]
    overrides += [f"data.root={tmp_path / 'images'}", "data.num_workers=0", "data.batch_size=2"] if needs_folder else []
    columns = "num_columns" in cfg.strategy
    cfg = tree(*overrides)
    if columns:  # on one process, as the same table of layers with one column
        cfg.strategy = OmegaConf.create(
            {"_target_": "lightning.pytorch.strategies.SingleDeviceStrategy", "device": "cpu"}
        )
    for key, narrow in (("width", 0.05), ("widen_factor", 1)):
        if cfg.model.model.get(key, 0) >= 1.0:
            cfg.model.model[key] = narrow
    if "bits" in cfg.strategy.get("sparsity", {}):
        cfg.strategy.sparsity.bits = {"*": 1}  # a narrow layer has few weights to share values
    metrics = command.run(cfg)
    assert "test/acc" in metrics, small
