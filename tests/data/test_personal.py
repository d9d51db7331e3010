"""What is masked as personal data and what is left alone, by kind, with precision and recall."""

import pytest

from data.config import ANONYMISED_KINDS
from data.personal import anonymise

MASKED = {
  'email': [
    'ann.lee+x@mail.example.org',
    'a@b.co',
    "o'neil@example.com",
    'jürgen@müller.de',
    'info@почта.рф',
    'user@例え.jp',
    'a@xn--mller-kva.de',
    'first_last@sub.domain.co.uk',
    'x@y-z.museum',
    'me@example.xn--p1ai',
  ],
  'ip': [
    '192.168.0.1',
    '10.0.0.255',
    'fe80::1',
    '2001:db8::8a2e:370:7334',
    '2a00:1450:4001:81b::200e',
    'fd12:3456:789a:1::1',
    '255.255.255.0',
  ],
  'phone': [
    '+44 20 7946 0958',
    '(555) 010-9999',
    '555-010-9999',
    '+35236450123',
    '0049 170 1234567',
    '00 44 20 7946 0958',
    '+1 (555) 010-9999',
    '020 7946 0958',
    '0170 1234567',
    '030/1234567',
    '06 12 34 56 78',
    '+49 (0)30 123456',
    '212.555.0199',
  ],
  'digits': [
    '4111 1111 1111 1111',
    '5500-0000-0000-0004',
    '3782 822463 10005',
    '3714-496353-98431',
    '123456789',
    '123-45-6789',
    '899-12-3456',
    'DE89 3704 0044 0532 0130 00',
    'GB82WEST12345698765432',
    '4111111111111111',
  ],
}
LEFT = {
  'email': [
    '@functools.cache',
    'a @ b',
    'user@localhost',
    'weights @ inputs.T',
    'git@',
    '@user.name',
    'a@b',
  ],
  'ip': [
    'x[1::2] + y[::3]',
    'version 1.2.3',
    '999.999.999.999',
    'face::b00c',
    'dead::beef',
    'std::vector',
    'abcd::fade::add',
    '12:30:45',
    'a::b',
  ],
  'phone': [
    '2020-2021 1999',
    'EUR 12 3456 7890',
    '2024-01-31 12:30:45',
    '1999-2000-2001',
    'x - 12 - 345',
    'pages 123-456',
    '10 000 000',
    '1234 5678 9012',
    '31-12-2024',
    '3.14159265358979',
    '978-3-16-148410-0',
    '100 200 300',
    '+3.140000; -3.140000',
  ],
  'digits': [
    '4111 1111 1111 1112',
    '1234 5678 9012 3456',
    '3782 822463 10006',
    '000-12-3456',
    '666-12-3456',
    '900-12-3456',
    '123-00-6789',
    '123-45-0000',
    'range(10000000)',
    'abc1234567890',
    '0x1234567890ab',
    '1_000_000_000',
    'DE89 3704 0044 0532 0130 01',
    '0.1234567890123',
    '2024-11-27',
  ],
}


@pytest.mark.parametrize('kind', ANONYMISED_KINDS)
def test_precision_and_recall_of_each_kind(kind):
  given = [(text, True) for text in MASKED[kind]] + [(text, False) for text in LEFT[kind]]
  right, wrong, missed = 0, [], []
  for text, personal in given:
    for before, after in (('', ''), ('see ', ' now'), ('(', ')'), ('x: ', '.'), ('\n', ', too')):
      changed, counts = anonymise(before + text + after, ANONYMISED_KINDS)
      if personal and (changed, counts) == (f'{before}<{kind.upper()}>{after}', {kind: 1}):
        right += 1
      elif personal:
        missed.append((before + text + after, changed))
      elif counts:
        wrong.append((before + text + after, changed))
  print(
    f'{kind}: precision {right / (right + len(wrong)):.3f}, '
    f'recall {right / (right + len(missed)):.3f} of {len(given)} texts in 5 contexts'
  )
  assert not wrong and not missed


def test_the_table_is_large_enough_to_mean_something():
  assert sum(map(len, [*MASKED.values(), *LEFT.values()])) >= 60
  assert MASKED.keys() == LEFT.keys() == set(ANONYMISED_KINDS)
