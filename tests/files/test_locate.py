"""Where an adapter or a model is."""

import pytest
from huggingface_hub.utils import HFValidationError, validate_repo_id

from merge_engine.errors import AdapterError
from merge_engine.files.locate import is_hub_id
from merge_engine.formats.open import open_adapters


@pytest.mark.quick
@pytest.mark.parametrize(
    "source", ["user/repo", "User-1/r.e-p_o", "_user/_repo", "-user/repo", "user/-repo", "user/.repo"]
)
def test_a_hub_id_is_what_the_hub_takes_for_one(source):
    try:
        validate_repo_id(source)
    except HFValidationError:
        assert not is_hub_id(source)
    else:
        assert is_hub_id(source)


def test_a_home_of_nobody_is_a_folder_that_does_not_exist():
    with pytest.raises(AdapterError, match=r"^~nobody_has_this_name/a does not exist, wanted a folder"):
        open_adapters(["~nobody_has_this_name/a"])
