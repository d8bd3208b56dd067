"""What a run says of itself: figures, tables, pictures."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from squall.conf import comparison, plots, reports, writers


def test_numbers_for_people():
    values = (None, True, 60965224, 12345.6, 0.98123456, "text")
    assert [writers.format_value(v) for v in values] == ["-", "yes", "60,965,224", "12,346", "0.9812", "text"]


def test_markdown_escapes_what_would_end_a_cell():
    assert "| a\\|b | 1 |" in writers.to_markdown([{"name": "a|b", "n": 1}, {"name": "c", "n": None}])


def test_shared_and_sliced_parameters_count_once():
    module = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False))
    module[1].weight = module[0].weight
    assert reports.num_held(module) == 12


def test_the_strategys_own_crossings_are_taken():
    own = [reports.GradientCrossing("conv3", 30.0, 30.0, 240.0)]
    assert reports.crossings_of(SimpleNamespace(strategy=SimpleNamespace(crossings=own)), 1) == own
    alone = SimpleNamespace(strategy=SimpleNamespace(model=nn.Linear(1, 1)), world_size=1)
    assert reports.crossings_of(alone, 1) == []


class Classifier(BoringModel):
    """Two convolutional kernels a column, on images of 5 pixels."""

    num_columns = 2

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Conv2d(1, 4, 5), nn.Flatten(), nn.Linear(4, 2))

    def validation_step(self, batch, batch_idx):
        self.log_dict({"val_loss": self(batch).sum(), "val_accuracy": 0.5})

    def test_step(self, batch, batch_idx):
        self.log("test_accuracy", 0.75)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(12, 1, 5, 5), batch_size=2)

    val_dataloader = test_dataloader = train_dataloader


def test_a_run_is_measured_and_drawn(tmp_path, capsys):
    report = reports.RunReport(tmp_path, warmup_batches=2)
    curve, kernels = plots.LearningCurve(tmp_path), plots.FirstLayerKernels(tmp_path)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[report, curve, kernels],
    )
    model = Classifier()
    trainer.fit(model)
    trainer.test(model, verbose=False)
    summary = json.loads((tmp_path / "summary.json").read_text())["summary"]
    assert summary["parameters_per_rank"] == [sum(p.numel() for p in model.parameters())]
    assert summary["test_accuracy"] == 0.75
    assert report._images == 2 * (2 * 6 - 2)
    assert "75.00 %" in capsys.readouterr().out
    assert "75.00 %" in (tmp_path / "summary.md").read_text()
    assert len(curve.train_loss) == 12
    assert [x for x, _ in curve.validation["val_accuracy"]] == [1, 2]
    for name in ("learning_curve.png", "conv1_kernels.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_mean_of_the_last_values():
    assert plots.smooth([0.0, 2.0, 4.0, 6.0], 2).tolist() == [0.0, 1.0, 3.0, 5.0]


def test_kernels_lie_as_in_the_paper():
    assert [plots._per_row(count) for count in (48, 16, 1, 7)] == [16, 8, 1, 7]
    weight = np.arange(96 * 3 * 11 * 11, dtype=np.float64).reshape(96, 3, 11, 11)
    figure = plots.draw_kernels(weight, 2)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [f"Column {n}: kernels {a} to {b} of 96, 11 x 11 x 3" for n, a, b in ((1, 1, 48), (2, 49, 96))]


def test_each_kernel_fills_its_own_range():
    kernels = np.stack([np.linspace(0, 1, 9), np.linspace(-100, 100, 9), np.zeros(9)]).reshape(3, 1, 3, 3)
    mosaic = plots._mosaic(kernels)
    height = 8 * 3
    assert mosaic.shape[2] == 3
    first, second = mosaic[:height, :height], mosaic[:height, height + 4 : 2 * height + 4]
    np.testing.assert_allclose(first, second)
    assert (first.min(), first.max()) == (0.0, 1.0)


def write_job(folder, overrides, **summary):
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    (folder / "summary.json").write_text(json.dumps({"summary": summary}))


def test_jobs_are_compared_by_what_they_differ_in(tmp_path):
    for number, strategy in ((2, "ddp"), (10, "single")):
        crossings = [{"bytes_per_image": 5}, {"bytes_per_image": 7}] if strategy == "ddp" else []
        write_job(
            tmp_path / str(number),
            [f"strategy={strategy}", "seed=3"],
            test_accuracy=0.9,
            parameters_per_rank=[3, 4],
            crossings=crossings,
        )
    rows = comparison.collect(tmp_path)
    assert [(row["job"], row["strategy"], "seed" in row) for row in rows] == [
        ("2", "ddp", False),
        ("10", "single", False),
    ]
    assert [row["bytes per image"] for row in rows] == [12, 0]
    assert "images/s" not in rows[0]
    assert len(comparison.draw(rows).axes) == 3


def test_a_sweep_without_summaries_has_no_comparison(tmp_path):
    from omegaconf import OmegaConf

    comparison.Comparison().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [reports.RunReport, plots.FirstLayerKernels])
def test_arguments_out_of_range(kind):
    with pytest.raises(ValueError, match="or more"):
        kind("there", -1)
