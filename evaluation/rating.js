// What does a rater see, and press? Everything that comes from the server is put into the page as
// text (textContent), never as markup.
'use strict';

const PREFERENCES = [
  ['left', 'Left is better', ['1', 'arrowleft']],
  ['tie', 'About equal', ['2', 'arrowdown', ' ']],
  ['right', 'Right is better', ['3', 'arrowright']],
];
const POINTS = [1, 2, 3, 4, 5];
const MEANINGS = { 1: 'very bad', 2: 'bad', 3: 'middling', 4: 'good', 5: 'very good' };

const at = (id) => document.getElementById(id);
const token = new URLSearchParams(location.hash.slice(1)).get('token') || '';
let rater = '';
let shown = null; // what the server last sent
let values = {}; // of scales, as far as they were given
let busy = false; // a key held down rates one thing, not ten

function made(tag, text, attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

async function call(name, more = {}) {
  if (busy) return;
  busy = true;
  try {
    const headers = { 'Content-Type': 'application/json' };
    if (token) headers.Authorization = `Bearer ${token}`;
    const body = JSON.stringify({ rater, ...more });
    const answer = await fetch(`/api/${name}`, { method: 'POST', headers, body });
    const state = await answer.json();
    if (!answer.ok) throw new Error(state.error);
    at('error').hidden = true;
    show(state);
  } catch (error) {
    // What is on the screen was not saved: it stays there.
    at('error').textContent = `Not saved: ${error.message}. Is the server still running?`;
    at('error').hidden = false;
  } finally {
    busy = false;
  }
}

function show(state) {
  shown = state;
  values = { ...(state.values || {}) };
  at('begin').hidden = true;
  at('rate').hidden = !state.unit;
  at('end').hidden = Boolean(state.unit);
  at('bar').hidden = false;
  at('bar').max = state.total;
  at('bar').value = state.done;
  at('count').textContent = `${state.done} of ${state.total}`;
  at('who').textContent = rater;
  if (!state.unit) {
    at('again').focus();
    return;
  }
  fill(at('prompt'), state.prompt);
  const titles = state.mode === 'pairs' ? ['Left', 'Right'] : ['Answer'];
  at('answers').replaceChildren(...state.answers.map((text, i) => {
    const section = made('section', '');
    const block = fill(made('pre', '', { tabindex: '0' }), text);
    section.append(made('h2', titles[i]), block);
    return section;
  }));
  keys(state.mode);
  buttons();
  window.scrollTo(0, 0);
}

function fill(block, text) {
  block.textContent = text.trim() ? text : '(empty)';
  block.classList.toggle('empty', !text.trim());
  block.scrollTop = 0;
  return block;
}

function keys(mode) {
  const named = mode === 'pairs'
    ? [['1 ←', 'left'], ['2 ↓ space', 'equal'], ['3 →', 'right'], ['U', 'the one before']]
    : [['1 to 5', 'the marked line'], ['↑ ↓', 'another line'], ['U', 'the one before']];
  at('keys').replaceChildren(...named.map(([key, what]) => {
    const pair = made('span', '');
    pair.append(made('kbd', key), ` ${what}`);
    return pair;
  }));
}

function current() {
  return values.now || shown.criteria.find((name) => !(name in values)) || shown.criteria[0];
}

function buttons() {
  if (shown.mode === 'pairs') {
    const row = made('div', '', { class: 'row', role: 'group', 'aria-label': 'preference' });
    for (const [value, label] of PREFERENCES) {
      row.append(button(label, values.preference === value, () => prefer(value)));
    }
    at('criteria').replaceChildren(row);
    return;
  }
  at('criteria').replaceChildren(...shown.criteria.map((name) => {
    const now = name === current();
    const row = made('div', '', { class: now ? 'row now' : 'row', role: 'group', 'aria-label': name });
    row.append(made('span', name));
    for (const point of POINTS) {
      const pressed = values[name] === point;
      row.append(button(`${point} ${MEANINGS[point]}`, pressed, () => give(name, point)));
    }
    return row;
  }));
}

function button(label, pressed, act) {
  const element = made('button', label, { type: 'button', 'aria-pressed': String(pressed) });
  element.addEventListener('click', act);
  return element;
}

function prefer(value) {
  call('rate', { unit: shown.unit, values: { preference: value } });
}

function give(name, point) {
  values[name] = point;
  delete values.now;
  if (shown.criteria.every((each) => each in values)) {
    call('rate', { unit: shown.unit, values });
  }
  buttons();
}

function move(step) {
  const place = shown.criteria.indexOf(current()) + step;
  values.now = shown.criteria[Math.max(0, Math.min(shown.criteria.length - 1, place))];
  buttons();
}

function back() {
  call('back', { unit: shown.unit || '' });
}

document.addEventListener('keydown', (event) => {
  if (!shown || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const key = event.key.toLowerCase();
  // A button that has the focus is pressed by space, and a long text is scrolled by arrows.
  if (key === ' ' && event.target.tagName === 'BUTTON') return;
  if (key.startsWith('arrow') && event.target.tagName === 'PRE') return;
  if (key === 'u') {
    back();
  } else if (!shown.unit) {
    return;
  } else if (shown.mode === 'pairs') {
    const chosen = PREFERENCES.find(([, , named]) => named.includes(key));
    if (!chosen) return;
    prefer(chosen[0]);
  } else if (POINTS.includes(Number(key))) {
    give(current(), Number(key));
  } else if (key === 'arrowdown' || key === 'arrowup') {
    move(key === 'arrowdown' ? 1 : -1);
  } else {
    return;
  }
  event.preventDefault();
});

document.addEventListener('DOMContentLoaded', () => {
  at('enter').addEventListener('submit', (event) => {
    event.preventDefault();
    rater = at('name').value.trim();
    at('name').blur();
    if (rater) call('next');
  });
  at('again').addEventListener('click', back);
});
