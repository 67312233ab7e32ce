"""A small GGUF file."""

from pathlib import Path

import gguf
import torch

from tests.models.tiny import tiny, tiny_tokenizer


def write_gguf(path: Path) -> int:
    """A small Llama as a GGUF file; where its weights begin."""
    model, writer = tiny(num_key_value_heads=4, attention_bias=False), gguf.GGUFWriter(path, "llama")
    for name, value in dict(block_count=3, context_length=512, embedding_length=48, feed_forward_length=64).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(97)
    vocabulary = tiny_tokenizer().get_vocab()
    # Two of several characters, for merges to make.
    tokens = [*sorted(vocabulary, key=lambda x: vocabulary[x])[:-2], "th", "the"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if number < 4 else 1 for number in range(len(tokens))])
    writer.add_token_merges(["t h", "th e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for name, tensor in model.state_dict().items():
        found = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(found, tensor.to(torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.stat().st_size - sum(x.numel() * 4 for x in model.state_dict().values())
