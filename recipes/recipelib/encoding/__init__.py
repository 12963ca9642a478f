"""Text to ids and labels: chat templates, shortening, exact loss masks, prompts and clozes."""

from recipelib.encoding.asking import (
    Asked,
    CausalAsker,
    Cloze,
    Demonstrate,
    MaskedAsker,
    ask,
    asker_of,
    beginning,
    record_of,
    requests_without_content,
    with_bar,
)
from recipelib.encoding.chat_template import ensure_chat_template
from recipelib.encoding.class_rows import (
    ClassCollator,
    ClassRows,
    class_asker,
    class_encoding,
    encode_class_rows,
    pad_texts,
)
from recipelib.encoding.cloze_rows import (
    ClozeRows,
    cloze_encoding,
    collate,
    encode_cloze_rows,
    example_of,
)
from recipelib.encoding.examples import (
    EncodedRows,
    Encoding,
    Example,
    encode_into,
    encode_rows,
    encode_stream,
    training_encoding,
)
from recipelib.encoding.formatting import (
    FORMS,
    check_form,
    encode_formatted,
    format_rows,
    show_counts,
)
from recipelib.encoding.prompt_encoder import IGNORED, Counts, DoesNotFit, PromptEncoder
from recipelib.encoding.tokens import TextEncoder
from recipelib.encoding.words import before_cloze, check_words, label_word_ids, word_encoder

__all__ = [
    "FORMS",
    "IGNORED",
    "Asked",
    "CausalAsker",
    "ClassCollator",
    "ClassRows",
    "Cloze",
    "ClozeRows",
    "Counts",
    "Demonstrate",
    "DoesNotFit",
    "EncodedRows",
    "Encoding",
    "Example",
    "MaskedAsker",
    "PromptEncoder",
    "TextEncoder",
    "ask",
    "asker_of",
    "before_cloze",
    "beginning",
    "check_form",
    "check_words",
    "class_asker",
    "class_encoding",
    "cloze_encoding",
    "collate",
    "encode_class_rows",
    "encode_cloze_rows",
    "encode_formatted",
    "encode_into",
    "encode_rows",
    "encode_stream",
    "ensure_chat_template",
    "example_of",
    "format_rows",
    "label_word_ids",
    "pad_texts",
    "record_of",
    "requests_without_content",
    "show_counts",
    "training_encoding",
    "with_bar",
    "word_encoder",
]
