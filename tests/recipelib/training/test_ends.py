"""Where trained answers end, found in the examples and kept in the generation config."""

from datasets import Dataset
from tiny_bert import tiny_bert
from tiny_llama import tiny_llama

from recipelib.training.ends import end_at, trained_ends


def test_the_ends_of_all_answers_are_found_the_most_frequent_first():
    turns = {"labels": [-100, 5, 6, 9, -100, -100, 7, 9]}
    call = {"labels": [-100, 5, 8]}
    assert trained_ends(Dataset.from_list([turns, call, turns])) == [9, 8]
    assert trained_ends(Dataset.from_list([turns] * 3000)) == [9]


def test_a_model_ends_there_besides_where_it_ended(tmp_path):
    model = tiny_llama(20, eos_token_id=2)
    config = model.generation_config
    config.temperature, config.eos_token_id = 0.5, 2  # which is only saved as it was loaded
    end_at(model, [9, 8])
    model.save_pretrained(tmp_path)
    assert model.generation_config is config
    assert (config.eos_token_id, config.temperature) == ([9, 8, 2], 0.5)
    end_at(model, [9])
    assert config.eos_token_id == [9, 8, 2]
    config.eos_token_id = None
    end_at(model, [9])
    assert config.eos_token_id == 9
    end_at(tiny_bert(20), [9])  # which writes nothing
