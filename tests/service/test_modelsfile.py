from pathlib import Path

import pytest

from extproc.envoyfile import template_folder
from extproc.modelsfile import Model, ModelsFileError, cluster_names, load_models, own_sockets

BAD_MODELS = sorted((Path(__file__).parents[1] / "golden" / "bad_models").glob("*.yaml"))


@pytest.mark.parametrize("path", BAD_MODELS, ids=lambda path: path.stem)
def test_each_mistake_gets_exactly_the_message_its_file_announces(path):
    """The leading comment lines are the whole expected report, without the file's name."""
    expected = []
    for line in path.read_text().splitlines():
        if not line.startswith("# "):
            break
        expected.append(f"{path}:{line[2:]}")
    with pytest.raises(ModelsFileError) as caught:
        load_models(path)
    assert list(caught.value.problems) == expected
    assert str(caught.value) == "\n".join(expected)


def test_the_shipped_file_names_digits_with_two_servers_per_arm_that_perch_starts():
    path = template_folder() / "models.yaml"
    (model,) = load_models(path)
    assert (model.name, model.prefix, model.warm) == ("digits", "/v2/models/digits/", "/v2/models/digits/ready")
    assert (model.deadline_s, model.min_healthy) == (15.0, 1)
    assert own_sockets(model) == model.stable + model.canary
    assert len(model.stable) == len(model.canary) == 2
    artifacts = path.parent.parent / "model_servers" / "artifacts" / "digits"
    assert model.artifacts == {"stable": artifacts / "1", "canary": artifacts / "2"}


def write_models(folder, text):
    path = folder / "models.yaml"
    path.write_text(text)
    return path


def test_what_is_left_out_gets_its_default(tmp_path):
    path = write_models(tmp_path, "m: {prefix: /m/, stable: ['h.example:1', '10.0.0.1:2', '[::1]:3']}\n")
    stable = ("h.example:1", "10.0.0.1:2", "[::1]:3")
    assert load_models(path) == (Model("m", "/m/", stable, (), "/m/ready", 15.0, 1, None),)


def test_models_keep_the_order_of_the_file_because_the_first_answers_for_the_server(tmp_path):
    path = write_models(tmp_path, "z: {prefix: /z/, stable: ['h:1']}\na: {prefix: /a/, stable: ['h:1']}\n")
    assert [model.name for model in load_models(path)] == ["z", "a"]


def test_artifacts_are_found_from_the_files_own_folder(tmp_path):
    text = "m: {prefix: /m/, stable: ['unix:m.sock'], artifacts: {stable: ../models/1, canary: /opt/2}}\n"
    (model,) = load_models(write_models(tmp_path, text))
    assert model.artifacts == {"stable": (tmp_path.parent / "models" / "1").resolve(), "canary": Path("/opt/2")}


def test_only_relative_sockets_are_servers_that_perch_starts(tmp_path):
    text = "m: {prefix: /m/, stable: ['unix:own.sock', 'unix:/run/other.sock'], canary: ['10.0.0.1:80']}\n"
    (model,) = load_models(write_models(tmp_path, text))
    assert own_sockets(model) == ("unix:own.sock",)


def test_a_name_may_grow_to_more_servers_than_are_listed(tmp_path):
    text = "m: {prefix: /m/, stable: ['s:1'], canary: ['canaries.example:1'], min_healthy: 3}\n"
    assert load_models(write_models(tmp_path, text))[0].min_healthy == 3


def test_a_model_without_a_canary_has_one_cluster():
    model = Model("m", "/m/", ("h:1",), (), "/m/ready")
    assert cluster_names(model) == ("m_stable",)


@pytest.mark.parametrize(("content", "why"), [(None, "cannot be read: No such file"), (b"\xff\xfe", "is not UTF-8")])
def test_a_file_that_cannot_be_read_is_one_problem(tmp_path, content, why):
    path = tmp_path / "models.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelsFileError, match=why) as caught:
        load_models(path)
    assert len(caught.value.problems) == 1
