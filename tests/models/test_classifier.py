"""The LightningModule: schedules' values, groups of parameters, what it logs, ten views."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from squall.models import ImageClassifier, LeNet5
from squall.models.schedules import cosine, exponential_steps
from squall.models.views import ten_crops


class Linear(nn.Module):
    """One layer that says its sizes."""

    def __init__(self, num_classes=3, image_size=2):
        super().__init__()
        self.num_classes, self.image_size, self.in_channels = num_classes, image_size, 1
        self.fc = nn.Linear(image_size**2, num_classes)

    def forward(self, x):
        return self.fc(torch.flatten(x, 1))


def loader(num_images=8, size=2, num_classes=3, batch_size=2):
    images = torch.randn(num_images, 1, size, size, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, torch.arange(num_images) % num_classes), batch_size)


def trainer(tmp_path, **arguments):
    defaults = dict(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0)
    return L.Trainer(**{**defaults, **quiet, "default_root_dir": tmp_path, **arguments})


class Rates(L.Callback):
    """The first group's rate at each step, and the last group's."""

    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        groups = trainer.optimizers[0].param_groups
        self.rates.append((groups[0]["lr"], groups[-1]["lr"]))


def rates_of(tmp_path, epochs=2, **arguments):
    rates = Rates()
    module = ImageClassifier(Linear(), **arguments)
    trainer(tmp_path, max_epochs=epochs, callbacks=[rates]).fit(module, loader())
    return [first for first, _ in rates.rates], rates.rates[-1]


def test_exponential_steps_are_cuda_convnets():
    third = 250 ** (1 / 3)
    values = [exponential_steps(p) for p in (0, 0.2499, 0.25, 0.4999, 0.5, 0.7499, 0.75, 0.9999, 1.0)]
    expected = [1, 1, 1 / third, 1 / third, 1 / third**2, 1 / third**2, 1 / 250, 1 / 250, 1 / 250]
    assert values == pytest.approx(expected)
    assert exponential_steps(0.5, target_factor=25, num_steps=2) == pytest.approx(1 / 25)  # the two-GPU file's biases
    assert [cosine(p) for p in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0])


def test_exponential_steps_in_training(tmp_path):
    rates, _ = rates_of(tmp_path, lr=0.02, schedule="exponential_steps")
    assert rates == pytest.approx([0.02 * 250 ** (-quarter / 3) for quarter in range(4) for _ in range(2)])


def test_steps_in_training(tmp_path):
    rates, _ = rates_of(tmp_path, lr=0.1, schedule="steps", steps_per_drop=3)
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001, 0.001])
    with pytest.raises(ValueError, match="steps_per_drop"):
        ImageClassifier(Linear(), schedule="steps", steps_per_drop=0)


def test_nesterov_s_momentum(tmp_path):
    module = ImageClassifier(Linear(), momentum=0.9, nesterov=True, schedule="none")
    assert module.configure_optimizers().defaults["nesterov"]
    assert not ImageClassifier(Linear(), schedule="none").configure_optimizers().defaults["nesterov"]


def test_cosine_one_cycle_and_none_in_training(tmp_path):
    rates, _ = rates_of(tmp_path, lr=0.1, schedule="cosine")
    assert rates == pytest.approx([0.1 * cosine(step / 8) for step in range(8)])
    for optimizer in ("sgd", "adam", "adamw"):
        rates, _ = rates_of(tmp_path, lr=0.1, schedule="one_cycle", optimizer=optimizer, warmup_fraction=0.5)
        assert max(rates) == pytest.approx(0.1)
        assert rates[0] == pytest.approx(0.1 / 25)
        assert rates.index(max(rates)) == 4
    assert rates_of(tmp_path, lr=0.1, schedule="none")[0] == [0.1] * 8


def test_plateau_drops_three_times_when_validation_stops_improving(tmp_path):
    class Flat(ImageClassifier):
        def validation_step(self, batch, batch_idx):
            self.log("val/acc", 0.5)

    rates = Rates()
    module = Flat(Linear(), lr=0.01, schedule="plateau", patience=0)
    trainer(tmp_path, max_epochs=7, callbacks=[rates]).fit(module, loader(2), loader(2))
    values = [first for first, _ in rates.rates]
    assert values == pytest.approx([0.01, 0.01, 1e-3, 1e-4, 1e-5, 1e-5, 1e-5])


def test_plateau_without_validation_keeps_the_rate(tmp_path):
    assert rates_of(tmp_path, lr=0.3)[0] == [0.3] * 8


def test_biases_may_learn_faster_and_everything_decays(tmp_path):
    for schedule in ("none", "exponential_steps"):
        first, last = rates_of(tmp_path, lr=0.01, schedule=schedule, bias_lr_factor=2)[1]
        assert last == pytest.approx(2 * first)
    module = ImageClassifier(Linear(), bias_lr_factor=2, schedule="none")
    groups = module.configure_optimizers().param_groups
    assert [[p.ndim for p in group["params"]] for group in groups] == [[2], [1]]
    assert {(group["weight_decay"], group["momentum"]) for group in groups} == {(5e-4, 0.9)}


def test_a_step_is_the_papers(tmp_path):
    """v <- 0.9 v - 0.0005 lr w - lr g, w <- w + v, which Torch's SGD does up to the factor lr in v."""
    module = ImageClassifier(Linear(), lr=0.1, schedule="none")
    weight = module.model.fc.weight.detach().clone()
    batches = loader(6)  # three of two
    expected, velocity, bias, bias_velocity = weight.clone(), torch.zeros_like(weight), module.model.fc.bias.detach(), 0
    bias = bias.clone()
    for images, labels in batches:
        w, b = expected.clone().requires_grad_(), bias.clone().requires_grad_()
        F.cross_entropy(F.linear(images.flatten(1), w, b), labels).backward()
        velocity = 0.9 * velocity - 0.0005 * 0.1 * expected - 0.1 * w.grad
        bias_velocity = 0.9 * bias_velocity - 0.0005 * 0.1 * bias - 0.1 * b.grad
        expected, bias = expected + velocity, bias + bias_velocity
    trainer(tmp_path, max_steps=3, max_epochs=-1).fit(module, batches)
    torch.testing.assert_close(module.model.fc.weight.detach(), expected)
    torch.testing.assert_close(module.model.fc.bias.detach(), bias)


def test_metrics_weigh_every_image_alike(tmp_path):
    module = ImageClassifier(Linear(12), schedule="none")
    data = loader(7, num_classes=12, batch_size=3)  # a last batch of one
    images, labels = data.dataset.tensors
    with torch.no_grad():
        logits = module(images)
    engine = trainer(tmp_path)
    for stage, run in (("val", engine.validate), ("test", engine.test)):
        logged = run(module, data, verbose=False)[0]
        top5 = (logits.topk(5).indices == labels[:, None]).any(1).float().mean().item()
        expected = {
            f"{stage}/loss": F.cross_entropy(logits, labels).item(),
            f"{stage}/acc": (logits.argmax(1) == labels).float().mean().item(),
            f"{stage}/acc_top5": top5,
        }
        assert logged == pytest.approx(expected)
    assert "test/acc_top5" not in engine.test(ImageClassifier(Linear(10)), loader(), verbose=False)[0]


def test_training_logs_its_loss(tmp_path):
    engine = trainer(tmp_path)
    engine.fit(ImageClassifier(Linear(), schedule="none"), loader())
    assert set(engine.callback_metrics) == {"train/loss"}


def test_ten_crops_against_a_loop():
    images = torch.randn(3, 2, 9, 8)
    views = ten_crops(images, 5)
    assert views.shape == (3, 10, 2, 5, 5)
    expected = []
    for mirrored in (False, True):
        for top, left in ((0, 0), (0, 3), (4, 0), (4, 3), (2, 1)):
            view = torch.empty(3, 2, 5, 5)
            for y in range(5):
                for x in range(5):
                    view[:, :, y, 4 - x if mirrored else x] = images[:, :, top + y, left + x]
            expected.append(view)
    assert torch.equal(views, torch.stack(expected, 1))
    with pytest.raises(ValueError, match="size=9"):
        ten_crops(images, 9)


def test_ten_views_average_the_softmax(tmp_path):
    module = ImageClassifier(Linear(image_size=3), test_views=10, schedule="none")
    data = loader(6, size=5)
    images, labels = data.dataset.tensors
    with torch.no_grad():
        views = [module(view).softmax(1) for view in ten_crops(images, 3).unbind(1)]
    mean = torch.stack(views).mean(0)
    logged = trainer(tmp_path).test(module, data, verbose=False)[0]
    assert logged["test/loss"] == pytest.approx(F.nll_loss(mean.log(), labels).item(), rel=1e-5)
    assert logged["test/acc"] == pytest.approx((mean.argmax(1) == labels).float().mean().item())
    predictions = torch.cat(trainer(tmp_path).predict(module, data))
    torch.testing.assert_close(predictions, mean)
    with pytest.raises(ValueError, match="test_views=10 needs test images larger than the model's 3 pixels"):
        trainer(tmp_path).test(module, loader(size=3), verbose=False)


def test_hyperparameters_are_saved_without_the_model(tmp_path):
    module = ImageClassifier(LeNet5(width=0.1), lr=0.03, schedule="cosine")
    assert "model" not in module.hparams
    assert module.hparams["lr"] == 0.03
    assert module.example_input_array.shape == (2, 1, 28, 28)
    engine = trainer(tmp_path, max_steps=1)
    engine.fit(module, loader(size=28))
    engine.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)
    again = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", model=LeNet5(width=0.1))
    assert again.hparams["schedule"] == "cosine"
    torch.testing.assert_close(again.state_dict(), module.state_dict())


def test_an_optimizer_of_ones_own(tmp_path):
    module = ImageClassifier(Linear(), optimizer=lambda params: torch.optim.RMSprop(params, lr=0.5), schedule="cosine")
    rates = Rates()
    engine = trainer(tmp_path, max_epochs=1, callbacks=[rates])
    engine.fit(module, loader())
    assert isinstance(engine.optimizers[0], torch.optim.RMSprop)
    assert rates.rates[0][0] == 0.5
    engine.save_checkpoint(tmp_path / "last.ckpt")
    torch.load(tmp_path / "last.ckpt", weights_only=True)


def test_a_schedule_needs_an_end(tmp_path):
    with pytest.raises(MisconfigurationException, match="max_epochs or max_steps"):
        trainer(tmp_path, max_epochs=-1).fit(ImageClassifier(Linear(), schedule="cosine"), loader())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "lbfgs"}, "optimizer must be"),
        ({"schedule": "linear"}, "schedule must be one of plateau"),
        ({"test_views": 5}, "test_views must be 1 or 10"),
        ({"num_lr_steps": 1}, "num_lr_steps"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ImageClassifier(Linear(), **arguments)


def test_ten_views_need_a_size():
    with pytest.raises(ValueError, match="image_size"):
        ImageClassifier(nn.Flatten(), test_views=10)
