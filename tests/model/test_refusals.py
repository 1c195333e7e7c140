"""What looks loadable and is not: another model's checkpoint, a quantisation, a parallel plan. One ModelError each."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    TorchAoConfig,
)
from transformers.models.deepseek_v2 import configuration_deepseek_v2 as stock

from deepseek_v2_modeling import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2Model,
    ModelError,
)
from deepseek_v2_modeling.configuration import RELATIVES
from deepseek_v2_modeling.loading import read_settings

from ..helpers.models import small_config, small_model

CLASSES = (DeepseekV2ForCausalLM, DeepseekV2ForSequenceClassification, DeepseekV2Model)
AUTO = (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModel)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("refusals") / "base"
    small_model().save_pretrained(path)
    return path


@pytest.fixture
def variant(base: Path, tmp_path: Path) -> Any:
    """variant(key=value) is the base with other values in its config.json."""

    def change(**values: Any) -> Path:
        path = tmp_path / "variant"
        shutil.copytree(base, path, dirs_exist_ok=True)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **values}))
        return path

    return change


@pytest.mark.parametrize("model_type", [*RELATIVES, "llama", "made_up"])
def test_another_models_checkpoint(variant: Any, model_type: str):
    """The tensors are all there: by name and shape it would load."""
    path = variant(model_type=model_type)
    for cls in (*CLASSES, DeepseekV2Config):
        with pytest.raises(ModelError) as error:
            cls.from_pretrained(path)
        assert f'model_type is "{model_type}", not "deepseek_v2"' in str(error.value)
        assert RELATIVES.get(model_type, "") in str(error.value)
    for cls in (*CLASSES, *AUTO):
        with pytest.raises(ModelError, match=f'{path}: model_type is "{model_type}"'):
            cls.from_pretrained(path, config=small_config())
    with pytest.raises(ModelError, match=f'{path}: model_type is "{model_type}".*; use one of .*deepseek_v3.*, youtu'):
        read_settings(str(path))


def test_a_config_of_another_class(base: Path):
    for config in (stock.DeepseekV2Config(num_hidden_layers=1), AutoConfig.for_model("llama", num_hidden_layers=1)):
        for cls in CLASSES:
            with pytest.raises(ModelError, match=r"it takes a deepseek_v2_modeling\.DeepseekV2Config"):
                cls(config)
            with pytest.raises(ModelError, match=r"it takes a deepseek_v2_modeling\.DeepseekV2Config"):
                cls.from_pretrained(base, config=config)


def test_use_mla_decides_the_attention(variant: Any):
    """As in the official code; a directory whose tensors are of the other kind does not fit."""
    path = variant(use_mla=False, rope_scaling=None, rope_parameters=None)
    for cls in (DeepseekV2Model, AutoModelForCausalLM):
        with pytest.raises(ModelError, match=r"missing tensors: .*k_proj.*unexpected tensors: .*kv_a_"):
            cls.from_pretrained(path)
    DeepseekV2Model.from_pretrained(variant(use_mla=True))


@pytest.mark.parametrize("cls", [*CLASSES, *AUTO])
def test_quantisation_by_keyword(base: Path, cls: Any):
    """Also where its library is missing: the error is ours, not about an installation."""
    given: list[dict[str, Any]] = [
        {"quantization_config": {"quant_method": "hqq"}},
        {"load_in_8bit": True},
        {"load_in_4bit": True},
    ]
    for keywords in given:
        with pytest.raises(ModelError, match=r"base: quantization_config \(.*\) is not supported"):
            cls.from_pretrained(base, **keywords)
    with pytest.raises(
        ModelError, match=r"base: quantization_config: bnb_4bit_quant_type is 'fp4': with nf4 only 'nf4'"
    ):
        cls.from_pretrained(base, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    cls.from_pretrained(base, quantization_config=None)


def test_torchao_by_keyword(base: Path):
    config = TorchAoConfig.__new__(TorchAoConfig)  # it cannot be made where torchao is missing
    config.quant_method = "torchao"
    with pytest.raises(ModelError, match=r"quantization_config \(torchao\) is not supported"):
        AutoModelForCausalLM.from_pretrained(base, quantization_config=config)


@pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_quantised_checkpoint(base: Path, variant: Any, method: str):
    path = variant(quantization_config={"quant_method": method, "bits": 4})
    config = DeepseekV2Config.from_pretrained(path)
    for cls in (*CLASSES, *AUTO):
        with pytest.raises(ModelError, match=rf"variant: quantization_config \({method}\) is not supported"):
            cls.from_pretrained(path)
        with pytest.raises(ModelError, match=rf"quantization_config \({method}\) is not supported"):
            cls.from_pretrained(base, config=config)


def test_an_adapter_on_a_quantised_base(variant: Any, tmp_path: Path):
    """transformers loads the base of an adapter that it is pointed at."""
    adapter = tmp_path / "adapter"
    get_peft_model(small_model(), LoraConfig(target_modules=["o_proj"])).save_pretrained(adapter)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    path = variant(quantization_config={"quant_method": "fp8"})
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(path)}))
    with pytest.raises(ModelError, match="quantization_config"):
        DeepseekV2ForCausalLM.from_pretrained(adapter)


def test_parallel_plans(base: Path):
    """Stock's name modules that these classes compute in another way."""
    given: list[dict[str, Any]] = [
        {"tp_plan": "auto"},
        {"tp_size": 2},
        {"distributed_config": object()},
        {"device_mesh": object()},
    ]
    for cls in (DeepseekV2ForCausalLM, AutoModelForCausalLM):
        for keywords in given:
            with pytest.raises(ModelError, match=f"base: {next(iter(keywords))} is not supported"):
                cls.from_pretrained(base, **keywords)
    model = DeepseekV2ForCausalLM.from_pretrained(base, device_map={"": "cpu"}, tp_plan=None)
    assert not (model.supports_tp_plan or model.supports_pp_plan)
    assert not (model._tp_plan or model._ep_plan or model._pp_plan)


def test_wrong_shapes_are_a_runtime_error_too(base: Path):
    """As transformers raises it."""
    with pytest.raises(RuntimeError, match="misshapen tensors: lm_head") as error:
        AutoModelForCausalLM.from_pretrained(base, vocab_size=70)
    assert isinstance(error.value, ModelError)
