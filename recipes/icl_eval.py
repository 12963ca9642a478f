"""In-context learning (Brown et al. 2020, arXiv:2005.14165): no training, examples in the prompt.

A frozen model is asked with k solved examples in front of each question. Labels are chosen by the
likelihood of their words, which can be calibrated (Zhao et al. 2021); free answers are written,
with the reasoning first if the template has one (chain of thought, Wei et al. 2022). Which examples
one draws matters: several draws show by how much.

Choose it when there are too few rows to train on, to see what a model can do before you train, or
to score any trained result; not when prompts have to be short: each pays for its examples.

    python recipes/icl_eval.py
    python recipes/icl_eval.py --template sst2 --shots 8 --draws 5 --score calibrated
    python recipes/icl_eval.py --template gsm8k --shots 8 --samples 5
    accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/icl_eval.py --shots 4
    python recipes/icl_eval.py --adapter runs/lora_sft --shots 0
"""

from dataclasses import dataclass

from recipelib.cli import RecipeArguments, option, run_recipe
from recipelib.runtime.errors import UserError, require_at_least

DEFAULTS = {"output_dir": "runs/icl_eval", "max_length": 4096}


@dataclass
class IclArguments(RecipeArguments):
    """Arguments of this method."""

    shots: int | None = option(None, "Demonstrations per prompt: 0, 1, 4, 16; the template's k.")
    sampler: str | None = option(
        None,
        "Which: first, random, balanced over classes, nearest to each row; the template's.",
        choices=["first", "random", "balanced", "nearest"],
    )
    nearest_by: str = option(
        "bm25", "Nearest by words (bm25) or the model's embedding.", choices=["bm25", "embedding"]
    )
    draws: int = option(1, "Repeat with so many draws of demonstrations; 5 show the spread.")
    score: str = option(
        "sum",
        "What decides among labels; all are reported. calibrated: where one label always wins.",
        choices=["sum", "mean", "bytes", "pmi", "calibrated"],
    )
    reasoning: str = option(
        "template",
        "template: its rationale first, if it has one; none: the answer only; trigger: zero-shot "
        "chain of thought.",
        choices=["template", "none", "trigger"],
    )
    trigger: str = option("Let's think step by step.", "What --reasoning trigger begins with.")
    samples: int = option(1, "Self-consistency: sample so many answers, the majority counts.")
    temperature: float | None = option(
        None, "Of written answers: 0 is greedy. [0.7 with several samples, else 0]"
    )
    adapter: str | None = option(None, "Folder or hub id of a PEFT adapter to put on the model.")
    predict: str | None = option(
        None, "A file of rows without answers: answer them, with --adapter if given, and stop."
    )
    resume: bool = option(False, "Go on where an interrupted run with this --output_dir stopped.")

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, shots=0, draws=1, samples=1, temperature=0)
        if self.temperature is None:
            self.temperature = 0.7 if self.samples > 1 else 0.0
        if self.samples > 1 and not self.temperature:
            raise UserError("--samples: samples at --temperature 0 are all the same; raise it")


def main(args: IclArguments, training) -> dict | None:
    """Score a model with demonstrations in its prompts.

    Returns:
        What metrics.json holds; None after --preview and --predict.
    """
    # Imported here, so that --help answers at once.
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForMaskedLM

    from recipelib.adapters.saved import resolve_adapter
    from recipelib.data.demonstrations import Demonstrations, bm25, rank, row_text
    from recipelib.data.rows import load_asked, parse_columns, row_key
    from recipelib.encoding.asking import CausalAsker, MaskedAsker
    from recipelib.encoding.prompt_encoder import PromptEncoder
    from recipelib.evaluation.answers import score_answers
    from recipelib.evaluation.labels import score_labels
    from recipelib.evaluation.losses import score_losses
    from recipelib.inference.embeddings import embed_texts
    from recipelib.inference.journal import Journal
    from recipelib.models.loading import (
        describe_model,
        is_masked,
        load_model,
        load_tokenizer,
        most_positions,
        stored_config,
        weights_identity,
    )
    from recipelib.models.sharding import place_model
    from recipelib.prompts.template import PromptTemplate
    from recipelib.reporting.few_shot import save_few_shot
    from recipelib.reporting.preview import preview_prompts, say_first_prompt
    from recipelib.runtime.console import progress, say
    from recipelib.runtime.files import read_metrics
    from recipelib.training.memory import MemoryMeter

    template = PromptTemplate.load(args.template, columns=parse_columns(args.columns))
    if args.reasoning == "none":
        fields = {key: value for key, value in template.fields.items() if key != "rationale"}
        template = PromptTemplate(fields, template.path)
    shots = template.demonstrations["k"] if args.shots is None else args.shots
    if args.reasoning == "trigger":
        shots = 0
    sampler = args.sampler or template.demonstrations["sampler"]
    pool, asked = load_asked(
        template, args, training.seed, shots=shots, progress=progress("checking")
    )
    model_name, adapter = args.model_name_or_path, None
    if args.adapter:
        adapter = resolve_adapter(args.adapter)
        kept = PeftConfig.from_pretrained(adapter)
        if not model_name:
            model_name, args.revision = kept.base_model_name_or_path, args.revision or kept.revision
        rendering = read_metrics(str(adapter)).get("rendering", args.rendering)
        if rendering != args.rendering:
            say(f"warning: the adapter was trained with --rendering {rendering}: ask so, too")
    if read_metrics(training.output_dir).get("trainable_parameters"):
        raise UserError(f"--output_dir {training.output_dir}: holds a trained run; name another")
    config = stored_config(model_name, revision=args.revision)
    masked = is_masked(config)
    if masked and args.reasoning == "trigger":
        raise UserError("--reasoning trigger: a masked model writes nothing; pass a causal model")
    # Closed answers are scored; what a model reasons or answers freely is written.
    writes = not template.label or args.reasoning == "trigger"
    writes = writes or (template.rationale is not None and not masked)
    if args.samples > 1 and not writes:
        raise UserError(
            f"--samples {args.samples}: {template.name} is answered by the likeliest label, which "
            "is always the same; leave it out, or add --reasoning trigger"
        )
    if args.score != "sum" and writes:
        raise UserError(
            f"--score {args.score}: answers of {template.name} are written; leave it out"
        )
    load = {"revision": args.revision, "trust_remote_code": training.trust_remote_code}
    tokenizer = load_tokenizer(model_name, **load)
    max_length = min(training.max_length, tokenizer.model_max_length, most_positions(config))
    encoder = PromptEncoder(
        template, tokenizer, max_length, args.rendering, args.chat_template_kwargs
    )
    asker = MaskedAsker(encoder) if masked else CausalAsker(encoder)

    memory, model = MemoryMeter(), None
    embeds = shots > 0 and sampler == "nearest" and args.nearest_by == "embedding"
    if embeds or not args.preview:
        model = load_model(
            model_name,
            dtype=training.model_dtype[0],
            attn_implementation=args.attn_implementation,
            model_class=AutoModelForMaskedLM if masked else None,
            **load,
        )
        model = place_model(
            PeftModel.from_pretrained(model, adapter) if adapter else model, training
        )

    # Which training rows are most like each row that is asked.
    nearest = None
    if shots and sampler == "nearest":
        texts, queries = ([row_text(template, row) for row in some.rows] for some in (pool, asked))
        if embeds:
            vectors = embed_texts(model, encoder.text, texts + queries, max_length=max_length)
            known = dict(zip(texts + queries, vectors, strict=True))
            stored = vectors[: len(texts)].T

            def similarity(some):
                return [known[one] for one in some] @ stored

        else:
            similarity = bm25(texts)
        keys = [row_key(template, row) for row in pool.rows]
        nearest = rank(similarity, queries, keys, most=shots + 1)
    # Each draw chooses the demonstrations of every row, or one fixed set for all rows.
    draws = [None]
    if shots:
        draws = [
            Demonstrations(
                template,
                pool.rows,
                shots,
                sampler,
                draw=draw,
                seed=training.seed,
                nearest=nearest,
                solve=asker.solve,
            )
            for draw in range(args.draws)
        ]
    if args.preview:
        return preview_prompts(asker, asked.rows[: args.preview], draws[0])

    say_first_prompt(asker, asked.rows[0], draws[0])
    budget = {"batch_tokens": args.eval_batch_tokens, "description": "scoring"}
    identity = {
        "model": weights_identity(model_name, args.revision),
        "adapter": adapter and weights_identity(str(adapter)),
        "dtype": str(training.model_dtype[0]),
    }
    journal = Journal(f"{training.output_dir}/partial", identity)
    if args.resume:
        say(f"resuming: {len(journal):,} results are there")
    else:
        journal.discard()
    budget["journal"] = journal
    answers = not args.predict
    if template.metric == "loss" and answers:
        result = score_losses(model, encoder, asked.rows, draws, **budget)
    elif not writes:
        result = score_labels(
            model, asker, asked.rows, draws, score=args.score, answers=answers, **budget
        )
    else:
        result = score_answers(
            model,
            encoder,
            asked.rows,
            draws,
            max_new_tokens=args.max_new_tokens,
            samples=args.samples,
            temperature=args.temperature,
            trigger=args.trigger if args.reasoning == "trigger" else "",
            seed=training.seed,
            answers=answers,
            **budget,
        )
    metrics = save_few_shot(
        result,
        encoder,
        training,
        model,
        {
            "model": describe_model(model_name),
            "adapter": args.adapter,
            "shots": shots,
            "sampler": sampler if shots else None,
            "score_by": args.score if result.by_score else None,
            "reasoning": args.reasoning,
            "samples": args.samples,
            "temperature": args.temperature,
            "eval_source": asked.source,
            "train_rows": len(pool.rows) if pool else 0,
            "peak_memory_bytes": memory.stop(),
        },
        predict=args.predict,
    )
    journal.discard()
    return metrics


if __name__ == "__main__":
    run_recipe(main, IclArguments, __doc__, DEFAULTS, resume="--resume true")
