"""Where an adapter or a model is."""

import pytest
from huggingface_hub.utils import HFValidationError, validate_repo_id

from merge_engine.files.locate import is_hub_id


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
