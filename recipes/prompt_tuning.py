"""Prompt tuning with a verbalizer: classification as the model's own pre-training task.

A template puts a row into a text with a blank ("The movie review is: [x] It was [mask]."), the
model says how likely each label word fills it, and a verbalizer makes labels of words (PET, Schick
and Schuetze 2021, arXiv:2001.07676; LM-BFF, Gao et al. 2021, arXiv:2012.15723). Trained is a soft
prompt, embeddings that stand in front of the text, while the model stays frozen (Lester et al.
2021, arXiv:2104.08691); or the model itself, through the same blank.

Choose it for classification with few rows, or to serve many tasks from one frozen model: a task is
a file of some kilobytes. With many rows LoRA or all parameters learn more.

    accelerate launch recipes/prompt_tuning.py
    accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/prompt_tuning.py
    accelerate launch recipes/prompt_tuning.py --tune model --per_class 16 --draws 5
    accelerate launch recipes/prompt_tuning.py --template my_task.yaml --search_label_words true
"""

import copy
import time
from dataclasses import dataclass
from pathlib import Path

from recipelib.cli import RecipeArguments, option, run_recipe
from recipelib.prompts.verbalizer import COMBINE
from recipelib.runtime.errors import UserError, require_at_least

DEFAULTS = {
    "output_dir": "runs/prompt_tuning",
    "learning_rate": None,  # what is tuned decides, see RATES
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # of all steps
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,  # whose soft prompt is computed once
    "train_sampling_strategy": "batch_rebalance",
}
# Embeddings in front of a frozen model want steps that would ruin the model's own weights. Three
# times a prefix's was better on TREC (0.89 after 0.85) and below the untouched model on SST-2.
RATES = {"soft_prompt": 0.03, "p_tuning": 3e-4, "prefix": 0.01, "model": 5e-5, "verbalizer": 1e-3}


@dataclass
class PromptArguments(RecipeArguments):
    """Arguments of this method."""

    tune: str = option(
        "soft_prompt",
        "soft_prompt; p_tuning: through a small network; prefix: keys and values in every layer; "
        "model: all parameters (PET); both: model and soft prompt; none: score only.",
        choices=["soft_prompt", "p_tuning", "prefix", "model", "both", "none"],
    )
    virtual_tokens: int = option(16, "Length of the soft prompt: 8 to 100; longer is slower.")
    init: str = option(
        "template",
        "Where a soft prompt or prefix starts: at the template's own text, the label words, words "
        "drawn from the vocabulary, or random numbers.",
        choices=["template", "words", "vocabulary", "random"],
    )
    prompt_encoder: str = option(
        "mlp", "The network of p_tuning: mlp, or lstm as in the paper.", choices=["mlp", "lstm"]
    )
    cloze: bool = option(
        False,
        "Ask a causal model by the template's cloze, wherever its blank is, instead of the prompt.",
    )
    combine: str = option(
        "logsumexp",
        "How words make a label's score: logsumexp adds their probabilities, mean as OpenPrompt.",
        choices=list(COMBINE),
    )
    soft_verbalizer: bool = option(
        False, "Train an embedding per label, which starts at its words (WARP), to read the blank."
    )
    calibrate: bool = option(
        False,
        "Divide by what the blank says without content: for --tune none with one-sided models.",
    )
    per_class: int | None = option(
        None, "Few-shot: draw so many training rows per class, and as many to choose the best pass."
    )
    draws: int = option(1, "With --per_class: draws of rows, each with its own run.")
    search_label_words: bool = option(
        False, "Propose label words from the training rows, write a template with them, and stop."
    )

    def __post_init__(self):
        super().__post_init__()
        require_at_least(self, virtual_tokens=1, draws=1, per_class=1)
        if self.draws > 1 and not self.per_class:
            raise UserError("--draws: draws of which rows? Pass --per_class, such as 16")
        if self.soft_verbalizer and self.tune == "none":
            raise UserError("--soft_verbalizer: is trained; leave it out, or --tune none")
        if self.soft_verbalizer and self.calibrate:
            raise UserError("--calibrate: --soft_verbalizer has no words; leave one of them out")


def main(args: PromptArguments, training) -> dict | None:
    """Train through the blank of a template, and score it beside the untouched model.

    Returns:
        What metrics.json holds; None after --preview, --predict and --search_label_words.
    """
    # Imported here, so that --help answers at once.
    import torch
    from transformers import AutoModelForMaskedLM, set_seed

    from recipelib.adapters.soft_prompts import compute_prompt_once, require_cache, start_ids
    from recipelib.adapters.soft_verbalizer import SoftVerbalizer
    from recipelib.data.drawing import few_shot_rows
    from recipelib.data.rows import load_splits, overlap, parse_columns
    from recipelib.encoding.asking import asker_of
    from recipelib.encoding.cloze_rows import encode_cloze_rows
    from recipelib.encoding.prompt_encoder import PromptEncoder
    from recipelib.encoding.words import before_cloze, check_words, label_word_ids
    from recipelib.evaluation.cloze_evaluation import answer_cloze_file
    from recipelib.evaluation.label_search import (
        classes_from_rows,
        save_label_words,
        search_label_words,
    )
    from recipelib.evaluation.labels import score_cloze
    from recipelib.models.loading import (
        describe_model,
        is_masked,
        load_model,
        load_tokenizer,
        stored_config,
    )
    from recipelib.models.sharding import place_model
    from recipelib.prompts.template import PromptTemplate
    from recipelib.reporting.card import publish
    from recipelib.reporting.cloze import load_snippet, save_draws, save_score
    from recipelib.reporting.preview import preview_cloze
    from recipelib.reporting.run import save_run
    from recipelib.runtime.checkpoints import find_checkpoint
    from recipelib.runtime.console import is_main_process, progress, say
    from recipelib.runtime.files import read_metrics
    from recipelib.runtime.launch import fsdp_option
    from recipelib.training.cloze_trainer import (
        ClozeTrainer,
        KeepBest,
        check_trained,
        heaviest_cloze_batch,
        rehearsed_loss,
    )
    from recipelib.training.memory import MemoryMeter, estimate_memory
    from recipelib.training.plan import show_plan

    if args.predict:
        return answer_cloze_file(args, training)
    if args.per_class and training.resume_from_checkpoint:
        raise UserError("--resume_from_checkpoint: few-shot runs are short; leave it out")
    if training.packing:
        raise UserError("--packing: rows with a blank are padded; leave it out")
    if training.load_best_model_at_end:
        raise UserError("--load_best_model_at_end: --per_class keeps the best pass; leave it out")
    sharded = fsdp_option("STATE_DICT_TYPE") == "sharded_state_dict"
    if sharded and args.tune not in ("model", "none"):
        # PEFT reads no soft prompt out of shards; it is some kilobytes anyway.
        raise UserError(
            f"--tune {args.tune}: is saved whole, and this launch saves shards; launch with "
            "accelerate_configs/fsdp2.yaml"
        )
    if args.draws > 1 and training.publish:
        raise UserError("--push_to_hub: which of the draws? Upload one, or train one")
    trained = read_metrics(training.output_dir).get("trainable_parameters")
    if trained and (args.tune == "none" or args.search_label_words):
        raise UserError(f"--output_dir {training.output_dir}: holds a trained run; name another")
    model_name, name = args.model_name_or_path, describe_model(args.model_name_or_path)
    load = {"revision": args.revision, "trust_remote_code": training.trust_remote_code}
    columns = parse_columns(args.columns)
    if args.search_label_words:
        template = classes_from_rows(args, columns, training.seed)
    else:
        template = PromptTemplate.load(args.template, columns=columns)
    if not template.label:
        raise UserError(f"{template.path}: verbalizer: is missing; the blank is read by its words")
    train, evaluation = load_splits(template, args, training.seed, progress=progress("checking"))
    if shared := overlap(train, evaluation, template):
        say(f"warning: {shared} evaluation rows are training rows too; the score will flatter")
    masked = is_masked(stored_config(model_name, revision=args.revision))
    tokenizer = load_tokenizer(model_name, **load)
    prompted = args.tune not in ("model", "none")
    room = min(training.max_length, tokenizer.model_max_length)
    if prompted and args.virtual_tokens >= room:
        raise UserError(f"--virtual_tokens {args.virtual_tokens}: {room} tokens fit; ask for fewer")
    encoder = PromptEncoder(
        template,
        tokenizer,
        room - args.virtual_tokens * prompted,
        args.rendering,
        args.chat_template_kwargs,
    )
    asker = asker_of(encoder, masked, args.cloze)
    question = template.questions(train.rows[0])[0]
    words = label_word_ids(asker, question)
    before = before_cloze(asker, question, next(iter(template.verbalizer.values()))[0])
    for note in check_words(template, encoder.text, words, before):
        say(note)
    scored = encode_cloze_rows(asker, evaluation.rows, soft=args.soft_verbalizer)
    if args.preview:
        return preview_cloze(scored, asker, args.preview)
    method = {
        "masked": masked,
        "cloze": masked or args.cloze,
        "verbalizer": "soft" if args.soft_verbalizer else "hard",
        "combine": args.combine,
        "calibrate": args.calibrate,
    }
    evaluate = {
        "combine": args.combine,
        "calibrate": args.calibrate,
        "batch_tokens": args.eval_batch_tokens,
    }

    def new_model():
        whole = args.tune in ("model", "both")
        return load_model(
            model_name,
            dtype=torch.float32 if whole else training.model_dtype[0],
            attn_implementation=args.attn_implementation,
            model_class=AutoModelForMaskedLM if masked else None,
            **load,
        )

    folders, drawn, checkpoint = [training.output_dir], [(train.rows, None)], None
    trained = {
        name: str(getattr(args, name))
        for name in ("tune", "virtual_tokens", "prompt_encoder", "soft_verbalizer")
    }
    if args.tune != "none" and not args.search_label_words:
        if args.per_class:
            seeds = range(training.seed, training.seed + args.draws)
            drawn = [few_shot_rows(template, train.rows, args.per_class, one) for one in seeds]
        if args.draws > 1:
            folders = [f"{training.output_dir}/draw_{draw}" for draw in range(args.draws)]
        for folder in folders:
            checkpoint = find_checkpoint(
                folder,
                training.resume_from_checkpoint,
                check=lambda found: check_trained(found, trained),
            )
        if args.draws > 1 and is_main_process():  # until all are done again
            Path(training.output_dir, "metrics.json").unlink(missing_ok=True)
    memory = MemoryMeter()
    model = new_model()
    if args.tune == "prefix":
        require_cache(model)
    model = place_model(model, training)
    if args.search_label_words:
        asked = encode_cloze_rows(asker, train.rows)
        found = search_label_words(model, asker, asked, scored, training.seed)
        save_label_words(found, template, training.output_dir)
        return None
    base = score_cloze(
        model,
        asker,
        encode_cloze_rows(asker, evaluation.rows),
        description="scoring base",
        **evaluate,
    )
    say(f"untouched model: {base}")
    if args.tune == "none":
        return save_score(base, encoder, training, model, name, memory.stop(), method)
    del model

    if training.learning_rate is None:
        training.learning_rate = RATES[args.tune.replace("both", "model")]
    runs = []
    for draw, (rows, chosen) in enumerate(drawn):
        run, validation = copy.copy(training), None
        run.accelerator_config = copy.deepcopy(training.accelerator_config)  # trainers write to it
        run.seed, run.output_dir = training.seed + draw, folders[draw]
        if chosen:
            validation = encode_cloze_rows(asker, chosen, soft=args.soft_verbalizer)
        blanks = encode_cloze_rows(
            asker, rows, soft=args.soft_verbalizer, progress=progress("encoding")
        )
        memory = MemoryMeter()
        model = new_model()
        # Only what is tuned gets gradients: PEFT freezes the rest.
        set_seed(run.seed)
        if prompted:
            ids = start_ids(args.init, args.virtual_tokens, asker, question, words)
            model = with_prompt(model, args, masked, ids)
        if args.tune == "both":
            model.base_model.requires_grad_(True)
        if args.soft_verbalizer:
            SoftVerbalizer.at_words(model, words).into(model)
        if prompted:
            compute_prompt_once(model)
        trainer = ClozeTrainer(
            model,
            run,
            blanks.encoded.examples,
            args.combine,
            held_out=scored.encoded.examples if run.eval_strategy != "no" else (),
            trained=trained,
            processing_class=tokenizer,
        )
        rates = {"soft_verbalizer": RATES["verbalizer"]}
        if args.tune == "both":
            rates["prompt_encoder"] = RATES["soft_prompt"]
        trainer.optimizer = trainer.optimizer_at(rates)
        estimated = estimate_memory(
            model, run, heaviest_cloze_batch(blanks.encoded.examples, run), rehearsed_loss
        )
        model = trainer.shard()
        sources = {"train": train.source, "eval": evaluation.source}
        show_plan(name, model, blanks.encoded, run, sources, estimated)
        best = None
        if validation:

            def score(model=model, validation=validation):
                found = score_cloze(model, asker, validation, description=None, **evaluate)
                right = [one["log_likelihoods"][one["answer"]] for one in found.records]
                return found.score, sum(right) / len(right)

            best = KeepBest(model, score)
            trainer.add_callback(best)
        memory.restart()
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.perf_counter() - start
        peak = memory.stop()
        tuned = score_cloze(model, asker, scored, description="scoring tuned", **evaluate)
        trainer.save_model(run.output_dir)
        runs.append(
            save_run(
                trainer,
                encoder,
                blanks.encoded,
                base,
                tuned,
                method=f"prompt_tuning ({args.tune})",
                model_name=name,
                load_snippet=load_snippet(
                    model, args.tune, masked, args.soft_verbalizer, run.output_dir
                ),
                estimated=estimated,
                peak_memory_bytes=peak,
                peak_resident_bytes=memory.resident,
                train_seconds=seconds,
                skipped_rows=train.skipped,
                more={
                    **method,
                    "tune": args.tune,
                    "virtual_tokens": args.virtual_tokens * prompted,
                    "validation_scores": [one[0] for one in best.scores] if best else None,
                },
            )
        )
        if training.publish:
            publish(run.output_dir, training)
    return runs[0] if args.draws == 1 else save_draws(runs, training.output_dir)


def with_prompt(model, args: PromptArguments, masked: bool, ids: list[int]):
    """PEFT's soft prompt or prefix in front of the model, which is frozen.

    PEFT has no task type for masked models: as a feature extractor it puts the prompt in front and
    leaves the rest to us.

    Args:
        ids: tokens at whose embeddings a soft prompt starts; none for random numbers.
    """
    import torch
    from peft import (
        PrefixTuningConfig,
        PromptEncoderConfig,
        PromptTuningConfig,
        get_peft_model,
    )

    from recipelib.adapters.soft_prompts import keys_and_values

    embeddings = model.get_input_embeddings().weight.detach()
    shape = {
        "task_type": "FEATURE_EXTRACTION" if masked else "CAUSAL_LM",
        "num_virtual_tokens": args.virtual_tokens,
        "revision": args.revision,  # of the base
    }
    if args.tune == "prefix":
        start = keys_and_values(model, ids) if ids and not masked else None
        model = get_peft_model(model, PrefixTuningConfig(**shape))
        prefix = model.prompt_encoder["default"].embedding.weight
        with torch.no_grad():
            # Random keys and values as large as PEFT's would drown the text (Li and Liang 2021).
            prefix.mul_(0.02) if start is None else prefix.copy_(start)
        return model
    # PEFT does not know what all models call these, nor embeddings of another size than states.
    shape |= {
        "token_dim": embeddings.shape[1],
        "num_layers": model.config.num_hidden_layers,
        "num_attention_heads": model.config.num_attention_heads,
    }
    if args.tune == "p_tuning":
        network = args.prompt_encoder.upper()
        return get_peft_model(
            model, PromptEncoderConfig(encoder_reparameterization_type=network, **shape)
        )
    model = get_peft_model(model, PromptTuningConfig(prompt_tuning_init="RANDOM", **shape))
    prompt = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        if ids:
            prompt.copy_(embeddings[ids])
        else:
            prompt.mul_(embeddings.float().std())  # of the spread of words
    return model


if __name__ == "__main__":
    run_recipe(main, PromptArguments, __doc__, DEFAULTS)
