// How does a person talk to the model? What it wrote, and whatever else comes from the server, is put
// into the page as text (textContent), never as markup.
'use strict';

const LIKELIEST = 5; // tokens that are shown beside the one that was taken
const RARE = 0.1; // below this probability a token is underlined

const at = (id) => document.getElementById(id);
const question = at('question');
let turns = []; // {role, content, element}, as they are shown
let pointed = null; // the token whose probability is shown
let running = null; // the AbortController of the answer that is being written

function made(tag, text, className = '') {
  const element = document.createElement(tag);
  element.textContent = text;
  if (className) element.className = className;
  return element;
}

function say(message) {
  at('error').textContent = message;
  at('error').hidden = !message;
}

function headers() {
  const key = at('key').value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// 1. What the server says.

async function refusal(answer) {
  // The message of an error in OpenAI's form, or what there is.
  let message = '';
  try {
    const body = await answer.json();
    message = body.error?.message ?? body.message ?? '';
  } catch {
    // No JSON: a proxy's page, of which the status says enough.
  }
  if (answer.status === 401) {
    options(true);
    at('key').focus();
  }
  return new Error(message || `the server answered ${answer.status} ${answer.statusText}`.trim());
}

async function* events(body) {
  // The data of server-sent events, whatever pieces they come in.
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = '';
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (pending + value).split('\n');
    pending = lines.pop();
    for (const each of lines) {
      const line = each.replace(/\r$/, '');
      if (line.startsWith('data:')) {
        data.push(line.slice(5).replace(/^ /, ''));
      } else if (!line && data.length) {
        yield data.join('\n');
        data = [];
      }
    }
  }
}

async function models() {
  try {
    const answer = await fetch('v1/models', { headers: headers() });
    if (!answer.ok) throw await refusal(answer);
    const ids = (await answer.json()).data.map((model) => model.id);
    const before = at('model').value;
    at('model').replaceChildren(...ids.map((id) => made('option', id)));
    if (ids.includes(before)) at('model').value = before;
    at('models').hidden = ids.length < 2;
    at('title').textContent = ids.length === 1 ? ids[0] : 'Chat';
    document.title = at('title').textContent;
    say('');
    return true;
  } catch (error) {
    say(`The server cannot be asked: ${error.message}`);
    return false;
  }
}

function request() {
  // What is sent; options that were not given are the server's.
  const system = at('system').value.trim();
  const messages = turns.map(({ role, content }) => ({ role, content }));
  if (system) messages.unshift({ role: 'system', content: system });
  const sent = { model: at('model').value, messages, stream: true, stream_options: { include_usage: true } };
  for (const name of ['temperature', 'top_p', 'max_tokens', 'seed']) {
    if (!at(name).reportValidity()) throw new Error(`${name}: ${at(name).validationMessage}`);
    if (at(name).value !== '') sent[name] = Number(at(name).value);
  }
  if (at('probabilities').checked) Object.assign(sent, { logprobs: true, top_logprobs: LIKELIEST });
  return sent;
}

// 2. An answer, as it is written.

class Answer {
  constructor(turn) {
    this.turn = turn;
    this.block = turn.element.querySelector('.text');
    this.waiting = []; // tokens whose text has not come
    this.taken = 0; // characters that tokens were made of
    this.bytes = new TextDecoder(); // a character may be in several tokens
    this.plain = null; // text behind the tokens
    this.finish = '';
    this.usage = null;
    this.began = performance.now();
  }

  add(chunk) {
    if (chunk.error) throw new Error(chunk.error.message ?? 'the server failed');
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (!choice) return;
    const { delta = {}, logprobs } = choice;
    if (delta.reasoning_content) this.think(delta.reasoning_content);
    for (const token of logprobs?.content ?? []) {
      const bytes = token.bytes ? new Uint8Array(token.bytes) : new TextEncoder().encode(token.token);
      this.waiting.push({ ...token, text: this.bytes.decode(bytes, { stream: true }) });
    }
    this.turn.content += delta.content ?? '';
    this.show();
    this.finish = choice.finish_reason ?? this.finish;
  }

  show() {
    // Tokens as far as they are the text; the rest of the text as it is.
    const { content } = this.turn;
    while (this.waiting.length) {
      const [token] = this.waiting;
      const rest = content.slice(this.taken);
      if (token.text && rest.length < token.text.length && token.text.startsWith(rest)) break;
      this.waiting.shift();
      if (!token.text || !rest.startsWith(token.text)) continue; // a thought's, a half or an unseen one
      this.plain?.remove();
      this.plain = null;
      this.block.append(spanOf(token));
      this.taken += token.text.length;
    }
    const rest = content.slice(this.taken);
    if (!this.plain && rest) this.block.append((this.plain = document.createTextNode('')));
    if (this.plain) this.plain.data = rest;
  }

  think(text) {
    let thought = this.turn.element.querySelector('.thought');
    if (!thought) {
      thought = made('details', '', 'thought');
      thought.append(made('summary', 'Reasoning'), made('pre', '', 'text'));
      this.block.before(thought);
    }
    thought.querySelector('.text').append(text);
  }

  end(how) {
    const seconds = (performance.now() - this.began) / 1000;
    const count = this.usage?.completion_tokens;
    const said = [how];
    if (count) said.push(`${count} tokens`, `${(count / seconds).toFixed(1)} tokens/s`);
    const cached = this.usage?.prompt_tokens_details?.cached_tokens;
    if (cached) said.push(`${cached} of ${this.usage.prompt_tokens} prompt tokens cached`);
    this.turn.element.append(made('p', said.filter(Boolean).join(' · '), 'end'));
  }
}

function spanOf(token) {
  const rare = Math.exp(token.logprob) < RARE;
  const span = made('span', token.text, rare ? 'token rare' : 'token');
  span.token = token;
  return span;
}

function turn(role, content) {
  const element = made('section', '', `turn ${role}`);
  const block = made('pre', content, 'text');
  block.dir = 'auto';
  if (role === 'assistant') block.tabIndex = 0;
  element.append(made('h2', role === 'user' ? 'You' : at('model').value || 'Model'), block);
  at('hint').hidden = true;
  at('log').append(element);
  turns.push({ role, content, element });
  return turns.at(-1);
}

function takeBack() {
  // Removes the last turn.
  turns.pop().element.remove();
  at('hint').hidden = turns.length > 0;
}

async function write() {
  // Asks for an answer to what was said so far.
  let sent;
  try {
    sent = request();
  } catch (error) {
    options(true);
    say(error.message);
    return;
  }
  say('');
  const answer = new Answer(turn('assistant', ''));
  const stopping = (running = new AbortController());
  busy(true);
  at('log').scrollTop = at('log').scrollHeight;
  let done = false;
  let near = true; // whether the end is in sight, and is to be kept there
  try {
    const reply = await fetch('v1/chat/completions', {
      method: 'POST',
      headers: { 'Content-Type': 'application/json', ...headers() },
      body: JSON.stringify(sent),
      signal: stopping.signal,
    });
    if (!reply.ok) throw await refusal(reply);
    for await (const data of events(reply.body)) {
      done = data === '[DONE]';
      if (done) break;
      near = bottom();
      answer.add(JSON.parse(data));
      if (near) at('log').scrollTop = at('log').scrollHeight;
    }
    if (!done) throw new Error('the connection broke off');
    near = bottom();
    answer.end({ stop: '', length: 'cut off at the most tokens' }[answer.finish] ?? answer.finish);
  } catch (error) {
    if (stopping.signal.aborted) {
      answer.end('stopped');
    } else {
      const said = `${error.message}.`.replace(/([.!?])\.$/, '$1');
      say(said[0].toUpperCase() + said.slice(1));
      if (answer.turn.content) answer.end('broken off');
    }
  } finally {
    if (running === stopping) {
      running = null;
      busy(false);
    }
    if (turns.at(-1) === answer.turn && !answer.turn.content && !done) {
      // There is no answer: the question is to be asked again.
      takeBack();
      if (!question.value) correct();
    } else if (near) {
      at('log').scrollTop = at('log').scrollHeight;
    }
  }
}

function bottom() {
  const log = at('log');
  return log.scrollHeight - log.scrollTop - log.clientHeight < 60;
}

// 3. What the person does.

function busy(is) {
  at('log').setAttribute('aria-busy', String(is));
  at('send').hidden = is;
  at('stop').hidden = !is;
}

function send() {
  const text = question.value;
  if (running || !text.trim()) return;
  question.value = '';
  turn('user', text);
  write();
}

function again() {
  // The last question is answered once more.
  if (running) return;
  if (turns.at(-1)?.role === 'assistant') takeBack();
  if (turns.at(-1)?.role === 'user') write();
}

function correct() {
  // The last question goes back into the box.
  if (turns.at(-1)?.role === 'assistant') takeBack();
  if (turns.at(-1)?.role !== 'user') return;
  question.value = turns.at(-1).content;
  takeBack();
}

function anew() {
  running?.abort();
  while (turns.length) takeBack();
  say('');
  question.focus();
}

function options(shown) {
  at('options').hidden = !shown;
  at('toggle').setAttribute('aria-expanded', String(shown));
}

function likely(span) {
  // Beside a token: how likely it was, and what else was.
  document.querySelector('.token.now')?.classList.remove('now');
  pointed = span;
  at('likely').hidden = !span;
  if (!span) return;
  const { token, logprob, top_logprobs: top = [] } = span.token;
  const rows = top.map((each) => [each.token, each.logprob, each.token === token]);
  if (!rows.some(([, , chosen]) => chosen)) rows.push([token, logprob, true]);
  const table = made('table', '');
  for (const [text, log, chosen] of rows) {
    const row = made('tr', '', chosen ? 'chosen' : '');
    const bar = made('progress', '');
    bar.value = Math.exp(log);
    const cell = made('td', '');
    cell.append(bar);
    const share = 100 * Math.exp(log);
    const percent = share < 0.1 ? '< 0.1%' : `${share.toFixed(1)}%`;
    row.append(made('td', JSON.stringify(text).slice(1, -1)), made('td', percent), cell);
    table.append(row);
  }
  at('likely').replaceChildren(table);
  beside(span);
}

function beside(span) {
  const place = span.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = at('likely');
  const above = place.top - height - 6;
  at('likely').style.left = `${Math.max(8, Math.min(place.left, innerWidth - width - 8))}px`;
  at('likely').style.top = `${above > 8 ? above : place.bottom + 6}px`;
}

function step(block, by) {
  // Along the tokens of an answer that has the focus.
  const spans = [...block.querySelectorAll('.token')];
  if (!spans.length) return;
  const place = spans.findIndex((span) => span.classList.contains('now'));
  const next = spans[Math.max(0, Math.min(spans.length - 1, place < 0 && by < 0 ? spans.length - 1 : place + by))];
  next.scrollIntoView({ block: 'nearest' });
  likely(next);
  next.classList.add('now');
}

document.addEventListener('keydown', (event) => {
  if (event.isComposing) return;
  // Some keyboards write another letter with Alt.
  const letter = event.key.toLowerCase();
  const key = /^[a-z]$/.test(letter) ? letter : (event.code ?? '').replace(/^Key/, '').toLowerCase();
  const inAnswer = event.target.matches?.('.assistant .text');
  if (event.key === 'Escape') {
    likely(null);
    running?.abort();
    question.focus();
  } else if (event.altKey && !event.ctrlKey && !event.metaKey && ['n', 'o', 'r'].includes(key)) {
    if (key === 'n') anew();
    if (key === 'r') again();
    if (key === 'o') {
      options(at('options').hidden);
      (at('options').hidden ? question : at('system')).focus();
    }
  } else if (event.target === question && event.key === 'Enter' && !event.shiftKey) {
    send();
  } else if (event.target === question && event.key === 'ArrowUp' && !question.value && !running) {
    correct();
  } else if (inAnswer && (event.key === 'ArrowRight' || event.key === 'ArrowLeft')) {
    step(event.target, event.key === 'ArrowRight' ? 1 : -1);
  } else {
    return;
  }
  event.preventDefault();
});

document.addEventListener('DOMContentLoaded', () => {
  at('ask').addEventListener('submit', (event) => {
    event.preventDefault();
    send();
  });
  at('options').addEventListener('submit', (event) => event.preventDefault());
  at('stop').addEventListener('click', () => running?.abort());
  at('new').addEventListener('click', anew);
  at('toggle').addEventListener('click', () => options(at('options').hidden));
  at('key').addEventListener('change', models);
  at('log').addEventListener('mouseover', (event) => likely(event.target.closest?.('.token') ?? null));
  at('log').addEventListener('mouseleave', () => likely(null));
  at('log').addEventListener('focusout', () => likely(null));
  at('log').addEventListener('scroll', () => pointed && beside(pointed));
  models();
  question.focus();
});
