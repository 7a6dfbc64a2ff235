"""Chat templates for files that bring none, written from the formats their makers document."""

_LLAMA2 = """\
{%- set system = messages[0].content if messages[0].role == 'system' else none -%}
{%- for message in (messages if system is none else messages[1:]) -%}
  {%- if message.role != ('user' if loop.index0 is even else 'assistant') -%}
    {{- raise_exception('Roles must alternate: user, assistant, ..., after at most one system') -}}
  {%- elif message.role == 'user' -%}
    {{- bos_token ~ '[INST] ' -}}
    {%- if loop.first and system is not none -%}
      {{- '<<SYS>>\\n' ~ system ~ '\\n<</SYS>>\\n\\n' -}}
    {%- endif -%}
    {{- message.content | trim ~ ' [/INST]' -}}
  {%- else -%}
    {{- ' ' ~ message.content | trim ~ ' ' ~ eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""

_MISTRAL = """\
{%- set system = messages[0].content ~ '\\n\\n' if messages[0].role == 'system' else '' -%}
{{- bos_token -}}
{%- for message in (messages[1:] if system else messages) -%}
  {%- if message.role != ('user' if loop.index0 is even else 'assistant') -%}
    {{- raise_exception('Roles must alternate: user, assistant, ..., after at most one system') -}}
  {%- elif message.role == 'user' -%}
    {{- '[INST] ' ~ (system if loop.first else '') ~ message.content ~ ' [/INST]' -}}
  {%- else -%}
    {{- message.content ~ eos_token ~ ' ' -}}
  {%- endif -%}
{%- endfor -%}
"""

_LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' -}}
  {{- message.content | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

_CHATML = """\
{%- for message in messages -%}
  {{- '<|im_start|>' ~ message.role ~ '\\n' ~ message.content ~ '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_ZEPHYR = """\
{%- for message in messages -%}
  {{- '<|' ~ message.role ~ '|>\\n' ~ message.content ~ eos_token ~ '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|assistant|>\\n' -}}
{%- endif -%}
"""

BUILT_IN = {
  "chatml": _CHATML,
  "llama2": _LLAMA2,
  "llama3": _LLAMA3,
  "mistral": _MISTRAL,
  "zephyr": _ZEPHYR,
}
