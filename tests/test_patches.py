import pytest
import torch

from nano_db.errors import UsageError
from nano_db.patches import check_patches, patch_positions, patchify, unpatchify


@pytest.mark.parametrize("shape, patch", [((3, 8, 8), 4), ((1, 6, 9), 3), ((2, 4, 4), 1)])
def test_unpatchify_is_the_inverse_of_patchify(shape, patch):
    images = torch.randn(5, *shape)
    patches = patchify(images, patch, shape)
    assert patches.shape == (5, shape[1] * shape[2] // patch**2, shape[0] * patch**2)
    assert torch.equal(unpatchify(patches, patch, shape), images)


def test_patches_go_row_by_row():
    images = torch.arange(36.0).view(1, 1, 6, 6)
    patches = patchify(images, 3, (1, 6, 6))
    assert patches[0, 1].tolist() == [3, 4, 5, 9, 10, 11, 15, 16, 17], "the second patch is the upper right one"


def test_positions_tell_rows_and_columns_apart():
    positions = patch_positions((3, 32, 16), 4, 16)
    assert positions.shape == (32, 16)
    assert torch.pdist(positions).min() > 0.1
    torch.testing.assert_close(positions.square().mean(1), torch.ones(32))
    grid = positions.view(8, 4, 16)
    assert torch.equal(grid[2, :, :4], grid[2, :1, :4].expand(4, 4)), "the first quarter knows the row alone"


@pytest.mark.parametrize(
    "patch, width, heads, message",
    [(5, 16, 2, "divide"), (4, 18, 2, "of 4"), (4, 16, 3, "heads 3")],
)
def test_sizes_that_do_not_divide_are_refused(patch, width, heads, message):
    with pytest.raises(UsageError, match=message):
        check_patches((3, 32, 32), patch, width, heads)


def test_images_of_another_shape_are_refused():
    with pytest.raises(UsageError, match="channels"):
        patchify(torch.zeros(2, 1, 32, 32), 4, (3, 32, 32))
