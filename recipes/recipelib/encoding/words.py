"""Encodes label words where they stand in the text that is asked, and checks what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from recipelib.encoding.asking import CausalAsker, ClozeAsker, MaskedAsker
from recipelib.prompts import PromptTemplate, Question
from recipelib.runtime import UserError

if TYPE_CHECKING:
    from recipelib.encoding.tokens import TextEncoder


def check_words(
    template: PromptTemplate,
    text: TextEncoder,
    encoded: Mapping[str, Sequence[Sequence[int]]],
    before: str = "",
) -> list[str]:
    """What a user should know about how a tokenizer encodes the label words, one line each.

    Args:
        encoded: label -> the ids of its words as they stand in the text that is asked.
        before: the character in front of a word there.
    Raises:
        UserError: a word that the tokenizer does not know, or words of two labels that it cannot
            tell apart.
    """
    tokenizer, notes = text.tokenizer, []
    # Only in ASCII: other scripts may have no spaces between words.
    glued = before.isascii() and bool(before.strip()) and before not in "([{<\"'`/-_"
    seen: dict[tuple[int, ...], tuple[str, str]] = {}
    for label, words in template.verbalizer.items():
        for word, ids in zip(words, map(tuple, encoded[label]), strict=True):
            where = f"{template.path.name}: verbalizer.{label}: {word!r}"
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
                raise UserError(
                    f"{where}: the tokenizer does not know it ({tokenizer.unk_token}); choose "
                    "another word"
                )
            other, its_word = seen.setdefault(ids, (label, word))
            if other != label:
                raise UserError(
                    f"{where}: the tokenizer cannot tell it from {its_word!r} of {other!r}; "
                    "choose another word"
                )
            spaced = tuple(text.encode(f" {word}"))
            if glued and spaced != ids:
                notes.append(
                    f"{where}: stands right behind {before!r}, as another word to the model than "
                    "behind a space; put one in front of it"
                )
            elif len(spaced) < len(ids):
                notes.append(
                    f"{where}: is {_pieces(tokenizer, ids)} where it stands and "
                    f"{_pieces(tokenizer, spaced)} behind a space; put one in front of the word"
                )
            elif len(ids) > 1:
                notes.append(
                    f"{where}: is {len(ids)} tokens, {_pieces(tokenizer, ids)}: each must be "
                    "likely; a word of one token competes on equal terms"
                )
    return notes


def _pieces(tokenizer, ids: Sequence[int]) -> str:
    return "|".join(tokenizer.decode([token]) for token in ids)


def label_word_ids(
    asker: CausalAsker | MaskedAsker, question: Question
) -> dict[str, list[list[int]]]:
    """For each label, the ids of its words where they stand in a question: in its cloze, or behind
    its prompt.
    """
    encode = word_encoder(asker, question)
    words = asker.encoder.template.words(question)
    return {label: [encode(word) for word in its_words] for label, its_words in words.items()}


def word_encoder(
    asker: CausalAsker | MaskedAsker, question: Question
) -> Callable[[str], list[int]]:
    """A function that returns the ids of a word where it stands in a question's cloze or answer."""
    encoder, template = asker.encoder, asker.encoder.template
    if isinstance(asker, CausalAsker) and not isinstance(asker, ClozeAsker):
        if question.asked is not None:
            return lambda word: encoder.answer(f" {word}")
        return lambda word: encoder.answer(template.text("answer", question, word=word))
    before, _ = encoder.cloze_parts(question)
    if isinstance(asker, MaskedAsker):
        return partial(encoder.text.word, before=before)
    space = before[len(before.rstrip()) :]
    return lambda word: encoder.text.continuation(space + word)


def before_cloze(asker: CausalAsker | MaskedAsker, question: Question, word: str) -> str:
    """The character in front of a word where it stands in a question's cloze or answer; "" in a
    chat, where the chat template decides on it.
    """
    if isinstance(asker, MaskedAsker):
        return asker.encoder.cloze_parts(question)[0][-1:]
    if asker.encoder.chat:
        return ""
    ids = [*asker.prompt(question, ()).ids, *word_encoder(asker, question)(word)]
    return asker.encoder.text.tokenizer.decode(ids).removesuffix(word)[-1:]
