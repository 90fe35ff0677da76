"""Chat templates that behave as those of well-known model families do; what they write is our own short text."""

from __future__ import annotations

CHATML = """\
{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""

LLAMA_2 = """\
{%- if messages[0].role == 'system' -%}
{%- set system, turns = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n', messages[1:] -%}
{%- else -%}{%- set system, turns = '', messages -%}{%- endif -%}
{%- for m in turns -%}
{%- if m.role == 'user' -%}
{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content | trim + ' [/INST]' }}
{%- else -%}{{ ' ' + m.content | trim + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}"""
"""No generation prompt, spaces around answers, the system message inside the first user's."""

LLAMA_3 = """\
{{- bos_token -}}
{%- for m in messages -%}
{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}"""
"""Headers, trimmed texts, a turn's end that is not EOS."""

LLAMA_3_NO_PROMPT = LLAMA_3[: LLAMA_3.index("{%- if add")]
"""A header that no generation prompt writes: the model has to."""

MISTRAL = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
{%- set system, turns = messages[0].content + '\\n\\n', messages[1:] -%}
{%- else -%}{%- set system, turns = '', messages -%}{%- endif -%}
{%- for m in turns -%}
{%- if m.role == 'user' -%}{{ '[INST] ' + (system if loop.last or loop.index == loop.length - 1 else '') + m.content }}
{{- '[/INST]' -}}
{%- else -%}{{ ' ' + m.content + eos_token }}{%- endif -%}
{%- endfor -%}"""
"""The system message in the last user's: earlier turns are written otherwise once more turns follow."""

GEMMA = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{ raise_exception('System role not supported') }}{%- endif -%}
{%- for m in messages -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{{ '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

QWEN_3 = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- if m.role != 'assistant' -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- else -%}
{%- set body, thought = m.content, '' -%}
{%- if m.reasoning_content is string -%}{%- set thought = m.reasoning_content -%}
{%- elif '</think>' in body -%}
{%- set thought = body.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set body = body.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last -%}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif -%}
{{ body.lstrip('\\n') + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
"""A thought before the last answer, empty where there is none, and no thoughts before earlier ones."""

PHI_3 = """\
{%- for m in messages -%}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- else -%}{{ eos_token }}{%- endif -%}"""
"""A turn's end that is not EOS, and EOS at the end of a chat only."""

DEEPSEEK_R1 = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{ m.content }}
{%- elif m.role == 'user' -%}{{ '<｜User｜>' + m.content }}
{%- else -%}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1].lstrip('\\n') + '<｜end｜>' }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<｜Assistant｜><think>\\n' }}{%- endif -%}"""
"""The generation prompt opens a thought, and no turn of a chat has one."""

ZEPHYR = """\
{%- for m in messages -%}{{ '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"""

VICUNA = """\
{%- set given = messages[0].content if messages[0].role == 'system' else 'A chat with a helpful assistant.' -%}
{{- given -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ ' USER: ' + m.content }}
{%- elif m.role == 'assistant' -%}{{ ' ASSISTANT: ' + m.content + eos_token }}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"""

FAMILIES: dict[str, tuple[str, list[str]]] = {
    "ChatML": (CHATML, ["<|im_start|>", "<|im_end|>"]),
    "Llama 2": (LLAMA_2, []),
    "Llama 3": (LLAMA_3, ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "Mistral": (MISTRAL, ["[INST]", "[/INST]"]),
    "Gemma": (GEMMA, ["<start_of_turn>", "<end_of_turn>"]),
    "Qwen 3": (QWEN_3, ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]),
    "Phi 3": (PHI_3, ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]),
    "DeepSeek R1": (DEEPSEEK_R1, ["<｜User｜>", "<｜Assistant｜>", "<｜end｜>", "<think>", "</think>"]),
    "Zephyr": (ZEPHYR, []),
    "Vicuna": (VICUNA, []),
}
"""Each family's template, and the added tokens that it writes beside BOS and EOS."""
