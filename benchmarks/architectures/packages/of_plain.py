"""Models written by hand (`plain`): no library's conventions, and the habits of many."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .case import Made
from .case import made as case
from .plain import other, text

SAMPLES = 4


def _ids(length: int = text.LENGTH, vocabulary: int = text.VOCABULARY) -> Tensor:
    return torch.randint(1, vocabulary, (SAMPLES, length))


def _returned(output: Tensor | tuple[Tensor, ...], batch: object) -> Tensor:
    """The loss that a model returns, alone or last."""
    return output[-1] if isinstance(output, tuple) else output


def _language(model: nn.Module, *more: Tensor) -> Made:
    targets = _ids()
    targets[0, -5:] = -1
    return case(model, *more, _ids(), targets, loss_fn=_returned)


def _speech() -> Made:
    lengths = torch.tensor([3, 4, 2, 4])
    return case(other.Conformer(), torch.randn(SAMPLES, 32, 16), torch.randint(1, 11, (SAMPLES, 4)), lengths, loss_fn=_returned)


def _edges() -> tuple[Tensor, Tensor]:
    return torch.arange(14) % 7, (torch.arange(14) * 3 + 1) % 7


def _clicks(mode: str) -> Made:
    bags = [torch.randint(0, n, (SAMPLES, 3)) for n in (40, 24, 12)]
    clicked = torch.tensor([1.0, 0.0, 1.0, 1.0])
    return case(other.Recommender(mode), torch.randn(SAMPLES, 6), bags, clicked, loss_fn=_returned)


def _floats(*shape: int) -> Tensor:
    return torch.randn(SAMPLES, *shape)


_CASES: dict[str, dict[str, Callable[[], Made]]] = {
    "text": {
        "nano_gpt": lambda: _language(text.NanoGPT()),
        "complex_llama": lambda: _language(text.ComplexLlama()),
        "complex_llama_one_key_head": lambda: _language(text.ComplexLlama(1)),
        "mamba": lambda: _language(text.Stack(text.MambaBlock)),
        "mamba2": lambda: _language(text.Stack(text.Mamba2Block)),
        "retention": lambda: _language(text.Stack(text.Retention)),
        "rwkv": lambda: _language(text.Stack(text.TimeMix)),
        "linear_attention": lambda: _language(text.Stack(text.LinearAttention)),
        "hyena": lambda: _language(text.Stack(text.Hyena)),
        "x_transformers": lambda: _language(text.Stack(text.XAttention)),
        "mixture": lambda: _language(text.Stack(text.HandMixture)),
        "translation": lambda: _language(text.Translation(), _ids(9)),
        "encoder": lambda: case(text.Encoder(), _ids()),
        "lstm": lambda: _language(text.Recurrent(nn.LSTM)),
        "lstm_tied": lambda: _language(text.Recurrent(nn.LSTM, tied=True)),
        "gru_both_ways": lambda: _language(text.Recurrent(nn.GRU, bidirectional=True)),
        "rnn": lambda: _language(text.Recurrent(nn.RNN)),
        "cells": lambda: _language(text.Cells()),
    },
    "sound": {
        "conformer": _speech,
        "wav2letter": lambda: case(other.Wav2Letter(), _floats(256)),
        "wavenet": lambda: case(other.WaveNet(), _ids(16, 32), _ids(16, 32), loss_fn=_returned),
        "temporal_convolutions": lambda: case(other.TemporalConvolutions(), _floats(4, 12)),
    },
    "image": {
        "unet": lambda: case(other.UNet(), _floats(3, 16, 16)),
        "lucid_vit": lambda: case(other.LucidViT(), _floats(3, 16, 16)),
        "conv_lstm": lambda: case(other.ConvLSTM(), _floats(4, 8, 8)),
        "radiance_field": lambda: case(other.Fields(), _floats(8, 3), _floats(3)),
        "autoencoder": lambda: case(other.Autoencoder(), torch.rand(SAMPLES, 20), _floats(4), loss_fn=_returned),
        "twins": lambda: case(other.Twins(), _floats(12), _floats(12), loss_fn=_returned),
    },
    "graph": {
        "dense_graph": lambda: case(other.DenseGraph(), _floats(7, 6), (torch.rand(SAMPLES, 7, 7) > 0.5).float()),
        "messages": lambda: case(other.Messages(), _floats(7, 6), *_edges()),
        "points": lambda: case(other.Points(), _floats(10, 3)),
        "latents": lambda: case(other.Latents(), _floats(9, 5)),
        "fourier_operator": lambda: case(other.Operator(), _floats(16, 2)),
        "series": lambda: case(other.Series(), _floats(16)),
        "splines": lambda: case(other.Splines(), _floats(8)),
    },
    "clicks": {
        "dlrm_sum": lambda: _clicks("sum"),
        "dlrm_mean": lambda: _clicks("mean"),
        "dlrm_max": lambda: _clicks("max"),
        "wide_and_deep": lambda: case(other.WideAndDeep(), _ids(5), torch.tensor([1.0, 0.0, 0.0, 1.0]), loss_fn=_returned),
        "two_towers": lambda: case(other.TwoTowers(), torch.arange(SAMPLES), torch.randint(0, 48, (SAMPLES, 3)), loss_fn=_returned),
    },
}

TASKS = tuple(_CASES)


def kinds(task: str) -> list[str]:
    """The models of a task."""
    return list(_CASES[task])


def made(task: str, kind: str) -> Made:
    """A small model of a kind."""
    torch.manual_seed(0)
    return _CASES[task][kind]()
