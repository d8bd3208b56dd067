"""What a job asks SLURM for is what its Trainer says; that it runs there is shown in ``tests/cluster``."""

import pytest
from hydra import compose, initialize_config_module
from hydra_plugins.squall_slurm import SlurmLauncher, shape_of

from squall.conf.main import UserError


def shape(*overrides):
    with initialize_config_module("squall.conf", version_base="1.3"):
        return shape_of(compose("squall", list(overrides)))


@pytest.mark.parametrize(
    ("overrides", "nodes", "tasks"),
    [
        ((), 1, 2),
        (("trainer.num_nodes=2",), 2, 1),
        (("trainer.num_nodes=2", "strategy.num_columns=4"), 2, 2),
        (("trainer.num_nodes=2", "strategy.data_parallel_size=2"), 2, 2),
        (("strategy=spatial_parallel", "strategy.num_tiles=[2,2]", "trainer.num_nodes=4"), 4, 1),
        (("strategy=hybrid_parallel", "trainer.num_nodes=2"), 2, 1),
        (("strategy=downpour", "trainer.num_nodes=4"), 4, 1),
        (("strategy=downpour", "trainer.num_nodes=4", "trainer.devices=3"), 4, 3),
    ],
)
def test_nodes_and_tasks_are_the_trainers(overrides, nodes, tasks):
    assert shape(*overrides) == {"nodes": nodes, "ntasks_per_node": tasks}


def test_gpus_are_its_devices():
    assert shape("trainer.accelerator=gpu", "trainer.devices=4")["gpus_per_node"] == 4
    assert "gpus_per_node" not in shape("trainer.devices=4")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [(("trainer.num_nodes=3",), "share 2 ranks evenly"), (("strategy=single", "trainer.num_nodes=2"), "one process")],
)
def test_what_no_job_can_be_is_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        shape(*overrides)


def test_signals_are_squalls_and_the_rest_is_the_users():
    made = SlurmLauncher(time=60, signal_seconds=90, partition=None, additional_parameters={"reservation": "mine"})
    told = made._parameters({"nodes": 2, "ntasks_per_node": 1})
    assert told["additional_parameters"] == {"requeue": True, "signal": "USR1@90", "reservation": "mine"}
    assert told["srun_args"] == ["--cpus-per-task=1"]
    assert "partition" not in told
