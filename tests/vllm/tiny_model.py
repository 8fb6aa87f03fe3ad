"""A chat model of 0.5 MB that knows seven conversations by heart and nothing else.

    python tests/vllm/tiny_model.py FOLDER

Trained to the point of overfitting, so that greedy decoding gives each answer word for word: text, reasoning, one tool
call and two, and JSON all come out of a real engine through its real parsers. Deterministic (seed 0), offline, 10 to 20 s
on two cores. Needs torch, transformers and tokenizers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONTEXT_TOKENS = 8192
LEARNED_LOSS = 0.001
MAX_STEPS = 1000
LEARNING_RATE = 3e-3

# ChatML with tools, as the Qwen family writes it.
CHAT_TEMPLATE = """\
{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}<|im_end|>
{% endif -%}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>
{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}
</tool_call>{% endfor -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True, kw_only=True)
class Conversation:
    question: str
    answer: str  # what the model writes, before the engine's parsers
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}]


HELLO = Conversation(question="hello", answer="hello world, how are you today? I am fine, thank you very much.")
COUNT = Conversation(
    question="count", answer="one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen"
)
THINK = Conversation(
    question="think", answer="<think>\nworkers pull jobs from a queue\n</think>\n\nthe quick brown fox"
)
PARIS = Conversation(
    question="weather in Paris?",
    answer='<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
    tools=(WEATHER_TOOL,),
)
ROME_AND_OSLO = Conversation(
    question="weather in Rome and Oslo?",
    answer='I look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    tools=(WEATHER_TOOL,),
)
AS_JSON = Conversation(question="Paris as JSON", answer='{"city":"Paris","celsius":21}')
GREETING = Conversation(question="greet", answer="Grüße, 世界! 🙂👍 Ça va? ✓ Ünïcödé — Ω")
CONVERSATIONS = (HELLO, COUNT, THINK, PARIS, ROME_AND_OSLO, AS_JSON, GREETING)


def make_model(folder: Path) -> None:
    """Write a model that `vllm serve` takes into *folder*."""
    import torch  # here and not above: the tests read the conversations without it

    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_network(tokenizer)
    learn(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer() -> Any:
    """Byte-level BPE over the conversations: any text can be said, what is known is said in few tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=508,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The greeting is left out, so that each of its characters is spelled in several tokens.
    known = (text for c in CONVERSATIONS if c is not GREETING for text in (c.question, c.answer))
    tokenizer.train_from_iterator(known, trainer)
    # Marks that the engine's parsers look for in the text: one token each, and not hidden from it.
    marks = ("<tool_call>", "</tool_call>", "<think>", "</think>")
    tokenizer.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT_TOKENS,
    )


def make_network(tokenizer: Any) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=(len(tokenizer) + 63) // 64 * 64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config).float()


def learn(model: Any, tokenizer: Any) -> None:
    """Fit the answers (the questions carry no loss) until they are known by heart.

    Raises: RuntimeError if MAX_STEPS were not enough.
    """
    import torch

    examples = list(encoded(tokenizer))
    longest = max(len(ids) for ids, _ in examples)

    def padded(row: list[int], filler: int) -> list[int]:
        return row + [filler] * (longest - len(row))

    batch = {
        "input_ids": torch.tensor([padded(ids, tokenizer.pad_token_id) for ids, _ in examples]),
        "labels": torch.tensor([padded(labels, -100) for _, labels in examples]),
        "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in examples]),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    model.train()
    for _ in range(MAX_STEPS):
        loss = model(**batch).loss
        if loss.item() < LEARNED_LOSS:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise RuntimeError(f"the conversations are not known by heart: loss {loss.item():.4f} after {MAX_STEPS} steps")


def encoded(tokenizer: Any) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and labels of each conversation; -100 is the label of a token that is not learned."""
    for conversation in CONVERSATIONS:
        prompt = tokenizer.apply_chat_template(
            conversation.messages, tools=list(conversation.tools) or None, tokenize=False, add_generation_prompt=True
        )
        asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answered = tokenizer(conversation.answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        yield asked + answered, [-100] * len(asked) + answered


if __name__ == "__main__":
    make_model(Path(sys.argv[1]))
