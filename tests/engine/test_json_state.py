"""What goes into JSON comes back equal, in value and in type; what cannot is refused."""

import json
from collections import Counter, OrderedDict
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemini_hpc.engine.json_state import from_json, to_json
from gemini_hpc.errors import UserError

keys = st.text() | st.integers() | st.booleans() | st.none() | st.floats(allow_nan=False)
plain = keys | st.tuples(st.integers(), st.text())
values = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(keys, inner)
        | st.dictionaries(keys, inner).map(OrderedDict)
        | st.dictionaries(keys, st.integers()).map(Counter)
    ),
    max_leaves=12,
)


def types_of(value: Any) -> Any:
    if isinstance(value, dict):
        return type(value), [(types_of(key), types_of(item)) for key, item in value.items()]
    return (type(value), [types_of(item) for item in value]) if isinstance(value, (list, tuple)) else type(value)


@given(values | st.dictionaries(st.just("!"), plain))
def test_everything_comes_back(value: Any) -> None:
    back = from_json(json.loads(json.dumps(to_json(value, "it"))))
    assert back == value
    assert types_of(back) == types_of(value)


@pytest.mark.parametrize("value", [object(), {1}, [b"x"], {"a": {"b": 1j}}, {(1, object()): 2}])
def test_what_has_no_json_is_refused(value: Any) -> None:
    with pytest.raises(UserError, match="lr_scheduler holds a"):
        to_json(value, "lr_scheduler")
