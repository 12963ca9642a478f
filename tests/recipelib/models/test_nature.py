"""What a model is and what it can take is known from its config, before weights are loaded."""

import sys

import pytest
from tokenizers_for_tests import fresh
from transformers import (
    BartConfig,
    BertConfig,
    BertGenerationConfig,
    DebertaV2Config,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    ReformerConfig,
    RobertaConfig,
    XLNetConfig,
)

from recipelib.models import nature_of
from recipelib.runtime import UserError

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>{% endfor %}"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
YARN["rope_theta"] = 1e4


def nature(tmp_path, config):
    config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    return nature_of(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (GPT2Config(), 1024),
        (GPT2Config(n_positions=64), 64),
        (OPTConfig(max_position_embeddings=128), 128),
        (BertConfig(), 512),
        (RobertaConfig(max_position_embeddings=514), 512),  # two stand before the first token
        (MptConfig(max_seq_len=96), 96),
        (LlamaConfig(), 2048),
        (LlamaConfig(rope_parameters=YARN), 8192),
        (MambaConfig(), sys.maxsize),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_it_reads_as_many_tokens_as_it_has_positions(tmp_path, config, positions):
    assert nature(tmp_path, config).positions == positions


@pytest.mark.parametrize(
    ("config", "masked"),
    [
        (BertConfig(architectures=["BertForMaskedLM"]), True),
        (BertConfig(), True),  # as a causal model it would see each answer
        (BertConfig(is_decoder=True, architectures=["BertLMHeadModel"]), False),
        (DebertaV2Config(), True),  # whose config on the hub names no architecture
        (LlamaConfig(), False),
    ],
    ids=["bert", "bare-bert", "bert-decoder", "deberta", "llama"],
)
def test_it_is_masked_unless_it_predicts_from_what_stands_before(tmp_path, config, masked):
    assert nature(tmp_path, config).masked == masked


def test_an_encoder_decoder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is an encoder-decoder model"):
        nature(tmp_path, BartConfig())


def test_a_text_is_never_longer_than_the_model_reads_and_that_is_said(tmp_path, capsys):
    bert, tokenizer = nature(tmp_path, BertConfig()), fresh("bert")
    assert bert.fitting(128, tokenizer) == 128
    assert not capsys.readouterr().out
    assert bert.fitting(1024, tokenizer, virtual_tokens=16) == 496
    assert "--max_length 1024" in (said := capsys.readouterr().out)
    assert "512" in said
    with pytest.raises(UserError, match=r"--virtual_tokens 512: 512 tokens fit"):
        bert.fitting(1024, tokenizer, virtual_tokens=512)


def test_tokens_without_an_embedding_are_refused_where_they_come_up(tmp_path):
    tokenizer = fresh("gpt2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    size = len(tokenizer)
    tokenizer.add_tokens(["<|go|>"], special_tokens=True)
    llama = nature(tmp_path, LlamaConfig(vocab_size=size))
    tokenizer.chat_template = CHATML  # which does not write it
    llama.check_tokens(tokenizer, chat=True)
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "<|go|>")
    llama.check_tokens(tokenizer, chat=False)
    with pytest.raises(UserError, match=rf"<\|go\|> is number {size}, .* ends at {size - 1}"):
        llama.check_tokens(tokenizer, chat=True)
    with pytest.raises(UserError, match=r"ends at 99; pass the tokenizer that belongs"):
        nature(tmp_path, LlamaConfig(vocab_size=100)).check_tokens(tokenizer, chat=False)


def test_a_pad_token_without_an_embedding_is_exchanged(tmp_path, capsys):
    tokenizer = fresh("gpt2")
    llama = nature(tmp_path, LlamaConfig(vocab_size=len(tokenizer)))
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    llama.check_tokens(tokenizer, chat=False)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert "has no embedding for <|pad|>" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (XLNetConfig(), r"\(xlnet\): sees what follows a token"),
        (BertGenerationConfig(), r"\(bert-generation\): sees what follows a token"),
        (ReformerConfig(is_decoder=True), r"\(reformer\): trains on texts of one fixed length"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_no_recipe_can_use_is_named_with_the_reason(tmp_path, config, says):
    with pytest.raises(UserError, match=says):
        nature(tmp_path, config)


def test_a_decoder_of_such_a_kind_is_taken(tmp_path):
    assert not nature(tmp_path, BertGenerationConfig(is_decoder=True)).masked
