"""A head that is asked at a few positions only."""

import pytest
import torch
from tiny_llama import tiny_llama

from recipelib.models.head import logits_at
from recipelib.runtime.errors import UserError

PLACES = torch.tensor([[1, 4], [0, 2], [1, 0]])


def test_the_logits_are_those_of_the_positions_in_their_order():
    model, ids = tiny_llama(50), torch.randint(50, (2, 5))
    whole = model(ids).logits
    with logits_at(model, PLACES, 5):
        few = model(ids).logits
    torch.testing.assert_close(few, whole[*PLACES.T][None])
    assert model(ids).logits.shape == whole.shape


def test_the_hook_is_gone_when_the_forward_pass_fails():
    model = tiny_llama(50)
    with pytest.raises(IndexError), logits_at(model, PLACES, 5):
        model(torch.zeros(2, 5, dtype=torch.long) + 50)
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.shape == (1, 3, 50)


def test_a_model_that_never_asks_its_head_is_refused():
    model = tiny_llama(50)
    said = "no last layer that can be asked at single positions"
    with pytest.raises(UserError, match=said), logits_at(model, PLACES, 5):
        model.model(torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_again_for_every_number_of_positions(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # conftest.py turns it off, here it is read
    model, graphs = tiny_llama(50), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch._dynamo.config.patch(disable=False):  # and here as it was at the import
        compiled = torch.compile(model, backend=backend)
        for step in range(5):
            ids, columns = torch.randint(50, (2, 20 + step)), torch.arange(3 + 5 * step % 13)
            places = torch.stack([columns % 2, columns], 1)
            with logits_at(model, places, ids.shape[1]):
                few = compiled(input_ids=ids, use_cache=False).logits
            whole = model(ids).logits
            torch.testing.assert_close(few, whole[*places.T][None], atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()
    assert len(graphs) == 2  # the first sizes, and any
