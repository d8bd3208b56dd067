"""Augmentation: each image its own draw, from Torch's default generator, one image as well as a batch."""

import pytest
import torch

from squall.models.augment import pca_noise, principal_colours, random_crop, random_flip, random_shift

BATCH = torch.arange(5 * 3 * 6 * 6, dtype=torch.float32).view(5, 3, 6, 6)
VALUES, VECTORS = torch.tensor([0.1, 0.2, 0.7]), torch.linalg.qr(torch.arange(9.0).view(3, 3) + torch.eye(3))[0]
AUGMENTATIONS = [
    lambda x: random_crop(x, 4),
    random_flip,
    lambda x: random_shift(x, 2),
    lambda x: pca_noise(x, VALUES, VECTORS),
]


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_equal_seeds_make_equal_images_and_others_dont(augment):
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(augment(BATCH))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_one_image_is_a_batch_of_one(augment):
    torch.manual_seed(3)
    single = augment(BATCH[2])
    torch.manual_seed(3)
    assert torch.equal(single, augment(BATCH[2:3])[0])
    assert single.ndim == 3


def test_crops_are_windows_and_all_of_them_occur():
    seen = set()
    for crop in random_crop(BATCH[:1].expand(200, 3, 6, 6), 4):
        top, left = divmod(int(crop[0, 0, 0]), 6)
        assert torch.equal(crop, BATCH[0, :, top : top + 4, left : left + 4])
        seen.add((top, left))
    assert len(seen) == 9
    assert random_crop(BATCH, 6).equal(BATCH)
    with pytest.raises(ValueError, match="size=7"):
        random_crop(BATCH, 7)


def test_flips_are_mirrors_of_about_half():
    result = random_flip(BATCH[:1].expand(400, 3, 6, 6))
    mirrored = torch.tensor([torch.equal(image, BATCH[0].flip(-1)) for image in result])
    same = torch.tensor([torch.equal(image, BATCH[0]) for image in result])
    assert (mirrored ^ same).all()
    assert 150 < mirrored.sum() < 250


def test_shifts_bring_in_zeros():
    image = torch.ones(1, 1, 6, 6)
    counts = {int(shifted.sum()) for shifted in random_shift(image.expand(300, 1, 6, 6), 2)}
    assert counts == {a * b for a in (4, 5, 6) for b in (4, 5, 6)}


def test_lighting_noise_has_the_papers_statistics():
    torch.manual_seed(0)
    noise = pca_noise(torch.zeros(20_000, 3, 2, 2), VALUES, VECTORS, std=0.1)
    assert (noise == noise[..., :1, :1]).all()  # the same for every pixel of an image
    factors = noise[:, :, 0, 0] @ VECTORS / VALUES  # along the principal colours, in their eigenvalues
    assert factors.mean(0).abs().max() < 0.003
    torch.testing.assert_close(factors.std(0), torch.full((3,), 0.1), rtol=0.03, atol=0)
    assert torch.corrcoef(factors.T).sub(torch.eye(3)).abs().max() < 0.03


def test_principal_colours_of_a_known_covariance():
    torch.manual_seed(0)
    pixels = torch.randn(4, 3, 100, 100) * VALUES.sqrt().view(3, 1, 1)
    images = torch.einsum("ij,njhw->nihw", VECTORS, pixels) + 0.5
    values, vectors = principal_colours(images)
    torch.testing.assert_close(values, VALUES, rtol=0.03, atol=0)
    torch.testing.assert_close((vectors * VECTORS).sum(0).abs(), torch.ones(3), rtol=0.02, atol=0)
