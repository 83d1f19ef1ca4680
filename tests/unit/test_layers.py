"""The registry of decoder layers: what is known, what is refused and why, and how a stack is found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from serving.engine.layers import KNOWN, Convention, LayerError, decoder_stack, require_architecture
from serving.engine.layers.refused import REFUSED
from serving.engine.layers.stack import supported_architectures
from tests.support.architectures import COMMITTED, render

HIDDEN, RESIDUAL = torch.ones(2, 4), torch.full((2, 4), 2.0)
OUTPUTS = {
    Convention.FUSED: (HIDDEN, RESIDUAL),
    Convention.PLAIN: HIDDEN,
    Convention.ALONE: (HIDDEN, None),
    Convention.STALE: (HIDDEN, RESIDUAL),
}


@pytest.mark.parametrize("convention", Convention)
def test_a_convention_adds_what_is_to_be_added(convention: Convention) -> None:
    hidden, residual = convention.stream(OUTPUTS[convention])
    assert hidden is HIDDEN
    assert residual is (RESIDUAL if convention is Convention.FUSED else None)


@pytest.mark.parametrize(
    ("convention", "output"),
    [
        (Convention.FUSED, HIDDEN),
        (Convention.FUSED, (HIDDEN, None)),
        (Convention.FUSED, (HIDDEN,)),
        (Convention.PLAIN, (HIDDEN, RESIDUAL)),
        (Convention.PLAIN, None),
        (Convention.ALONE, HIDDEN),
        (Convention.ALONE, (HIDDEN, RESIDUAL)),
        (Convention.STALE, HIDDEN),
        (Convention.STALE, (HIDDEN, None)),
    ],
)
def test_another_shape_is_refused(convention: Convention, output: object) -> None:
    with pytest.raises(LayerError, match=rf"'{convention.value}'.*known\.py"):
        convention.stream(output)


def test_no_architecture_is_both_known_and_refused_or_listed_twice() -> None:
    listed = [name for known in KNOWN.values() for name in known.architectures]
    assert len(listed) == len(set(listed))
    assert not set(listed) & set(REFUSED)


@pytest.mark.covers("architecture that was not read", "noticed")
@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_architecture_is_named_with_its_reason(name: str) -> None:
    with pytest.raises(LayerError) as refusal:
        require_architecture([name])
    assert name in str(refusal.value)
    assert REFUSED[name] in str(refusal.value)


def test_a_refused_name_beside_a_known_one_is_refused() -> None:
    with pytest.raises(LayerError, match="Zamba2ForCausalLM"):
        require_architecture(["LlamaForCausalLM", "Zamba2ForCausalLM"])


@pytest.mark.covers("architecture that was not read", "noticed")
def test_an_unread_architecture_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(LayerError, match=r"SomethingNew.*nobody has.*GPTNeoXForCausalLM.*known\.py"):
        require_architecture(["SomethingNew"])
    with pytest.raises(LayerError, match="not stated"):
        require_architecture([])


def test_known_and_refused_names_are_vllm_s() -> None:
    from vllm import ModelRegistry

    names = set(ModelRegistry.get_supported_archs())
    assert set(supported_architectures()) <= names
    assert set(REFUSED) <= names


class Wrapper(nn.Module):
    """A multimodal model: its vision tower has layers of its own, as many as the language model."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Identity() for _ in range(count))
        self.language_model = nn.Module()
        self.language_model.model = nn.Module()
        self.language_model.model.layers = nn.ModuleList(Strange() for _ in range(count))

    def get_language_model(self) -> nn.Module:
        return self.language_model


class Strange(nn.Module):
    """A decoder layer that nobody has read."""


def test_the_language_model_is_looked_into_and_unknown_layers_are_refused() -> None:
    with pytest.raises(LayerError, match=r"test_layers\.Strange is not known"):
        decoder_stack(Wrapper(3), 3)


def test_a_list_of_another_length_is_not_the_decoder() -> None:
    with pytest.raises(LayerError, match="one list of 4 decoder layers"):
        decoder_stack(Wrapper(3), 4)


def test_the_document_is_what_the_registry_says() -> None:
    assert COMMITTED.read_text() == render(), "run: python -m tests.support.architectures"
