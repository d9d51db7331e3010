"""Chat templates in the styles that are met in practice, and conversations for them."""

CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe helpful.<|im_end|>\\n' }}
    {%- endif %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- message.content + '<|im_end|>' }}
        {%- endgeneration %}
        {{- '\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if thinking is defined and thinking is false %}{{
      '<think>\\n\\n</think>\\n\\n'
    }}{% endif %}
{%- endif %}
"""

HEADERS = """{{- bos_token }}
{%- set offset = 0 %}
{%- if messages[0]['role'] == 'system' %}
  {%- set system = messages[0]['content'] | trim %}
  {%- set offset = 1 %}
{%- else %}
  {%- set system = '' %}
{%- endif %}
{%- macro turn(role, content) -%}
  <|start|>{{ role }}<|end|>

{{ content | trim }}{{ eos_token }}
{%- endmacro %}
{{- turn(
  'system',
  ('Tools: ' ~ (tools | tojson(indent=2)) ~ '\\n' if tools is not none else '') ~ system
) }}
{%- for message in messages[offset:] -%}
  {%- if message.role not in ['user', 'assistant'] %}{{
    raise_exception('Who is ' + message.role + '?')
  }}{% endif %}
  {{- turn(message.role, message.content) }}
{%- endfor %}
{%- if add_generation_prompt %}<|start|>assistant<|end|>

{% endif %}
"""

INSTRUCT = """{{ bos_token }}{% set ns = namespace(system='', turns=0) %}
{% for message in messages %}
    {% if message['role'] == 'system' %}
        {% set ns.system = message['content'] %}
        {% continue %}
    {% endif %}
    {% if (message['role'] == 'user') != (ns.turns % 2 == 0) %}
        {{ raise_exception('user and assistant must alternate') }}
    {% endif %}
    {% if message['role'] == 'user' %}
[INST] {{
  (ns.system + '\\n\\n' if ns.system and ns.turns == 0 else '') + message['content']
}} [/INST]
    {% else %}
{% generation %} {{ message['content'].strip() }}{{ eos_token }}{% endgeneration %}
    {% endif %}
    {% set ns.turns = ns.turns + 1 %}
{% endfor %}"""

TEMPLATES = {'chatml': CHATML, 'headers': HEADERS, 'instruct': INSTRUCT}
SYSTEM = [{'role': 'system', 'content': 'Answer in  one word. '}]
TURNS = [
  {'role': 'user', 'content': ' Caf\u00e9 or <tea> & "milk"?\n'},
  {'role': 'assistant', 'content': 'Tea!  '},
  {'role': 'user', 'content': 'Why?'},
]
CONVERSATIONS = {
  'one turn': TURNS[:1],
  'with system': SYSTEM + TURNS[:1],
  'many turns': SYSTEM + TURNS,
  'answered': TURNS[:2],
}
