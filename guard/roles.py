"""Whose words a token is: system, user or assistant, told from the headers that the model's chat template writes.

    >>> roles = RoleMap.of(tokenizer)          # once: renders the template, some tens of times
    >>> roles.roles(token_ids)                 # per prompt: uint8, one index into ROLES per token
    >>> roles.decisions(token_ids)             # where answers of the assistant begin to be decided

No model's template is known here by name. The template is rendered with contents that differ in one place; what stays
the same between two contents is the template's own, and what begins a turn in it is that turn's header.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from guard.errors import CalibrationError
from guard.policy import Role

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES: tuple[Role, ...] = ("system", "user", "assistant")
"""In the order of their ids, 0, 1, 2."""

Ids = tuple[int, ...]
TokenIds = Sequence[int] | npt.NDArray[np.integer[Any]]


class _Turns(NamedTuple):
    """Every header of a sequence, ascending; none lies inside another."""

    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]
    """One past the last token of the header."""
    roles: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class RoleMap:
    """The headers of one tokenizer's chat template, and what they say of a sequence of token ids.

    A turn reaches from its header to the next one: the header's own tokens and what ends the turn belong to it. Where
    one header lies inside another, the longer counts.

    **Text can make turns.** A client may write a header into a message. Where the tokenizer reads it as the template's
    own tokens, the model sees a turn there, and so does this map: it says what the model was shown, not who typed it.
    """

    system: tuple[Ids, ...]
    """Headers of a system turn; empty where the template has no such turn of its own (Gemma, Mistral): what it writes
    of a system prompt stands in a user turn, and counts as the user's."""
    user: tuple[Ids, ...]
    assistant: tuple[Ids, ...]
    preamble: Role | None = None
    """Whose the tokens before the first header are. None: they belong to the first turn, as the begin-of-text token
    does. `system` where the template writes the system prompt there, without a header (DeepSeek)."""
    reason: str = ""
    """Why the headers could not be told; empty where they could."""
    _by_first: tuple[tuple[int, tuple[tuple[Ids, int], ...]], ...] = field(init=False, repr=False, compare=False)
    """The headers by their first token: that token is looked for once."""

    def __post_init__(self) -> None:
        by_first: dict[int, list[tuple[Ids, int]]] = {}
        owners: dict[Ids, Role] = {}
        for role_id, role in enumerate(ROLES):
            for header in self.headers(role):
                if not header:
                    raise CalibrationError(f"chat roles: an empty header for `{role}`")
                if header in owners:
                    raise CalibrationError(f"chat roles: `{owners[header]}` and `{role}` share the header {header}")
                owners[header] = role
                by_first.setdefault(header[0], []).append((header, role_id))
        if self.known != bool(self.user and self.assistant) or (not self.known and (owners or self.preamble)):
            raise CalibrationError("chat roles: expected headers of user and assistant, or a reason why there are none")
        object.__setattr__(self, "_by_first", tuple((first, tuple(group)) for first, group in by_first.items()))

    @property
    def known(self) -> bool:
        """Whether the headers could be told. Where not, every token counts as the user's."""
        return not self.reason

    @classmethod
    def unknown(cls, reason: str) -> RoleMap:
        """The map that gives every token to the user."""
        assert reason
        return cls((), (), (), None, reason)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> RoleMap:
        """The headers of a tokenizer's chat template, or a map that says why they cannot be told.

        What is found is held against conversations that it was not found from before it is believed.
        """
        if not getattr(tokenizer, "chat_template", None):
            return cls.unknown("the tokenizer has no chat template")
        reasons = []
        for in_parts in (False, True):
            chat = _Chat(tokenizer, in_parts)
            try:
                return next(candidate for candidate in _discover(chat) if _holds(candidate, chat))
            except StopIteration:
                reasons.append("the headers that the chat template seems to write do not tell its own turns apart")
            except _UntoldError as error:
                reasons.append(str(error))
        return cls.unknown(reasons[0])

    def headers(self, role: Role) -> tuple[Ids, ...]:
        return {"system": self.system, "user": self.user, "assistant": self.assistant}[role]

    def roles(self, token_ids: TokenIds) -> npt.NDArray[np.uint8]:
        """uint8 [T]: an index into `ROLES` for every token.

        Of a sequence without a header, and of every sequence where the map is unknown, all tokens are the user's.

        Prefixes: `roles(ids[:n])` is `roles(ids)[:n]`, but for the tokens of a header that the cut goes through, which
        still count as the turn before, and for what stands before the first header, which is known with that header.
        """
        ids = _as_array(token_ids)
        starts, _, roles = self._turns(ids)
        if not len(starts) or starts[0]:
            first = self.preamble or ("user" if not len(starts) else ROLES[roles[0]])
            starts = np.concatenate([[0], starts])
            roles = np.concatenate([np.array([ROLES.index(first)], dtype=np.uint8), roles])
        return np.repeat(roles, np.diff(starts, append=len(ids)))

    def decisions(self, token_ids: TokenIds) -> npt.NDArray[np.int64]:
        """int64, ascending: the last token of every assistant header of a prompt, where answers begin to be decided.

        With a generation prompt the last of them is the prompt's last token. Where the map is unknown, only the last
        token is given. Ask for a whole prompt: in a prefix a header may end too early.
        """
        ids = _as_array(token_ids)
        if not self.known:
            return np.arange(max(0, len(ids) - 1), len(ids), dtype=np.int64)
        turns = self._turns(ids)
        places: npt.NDArray[np.int64] = turns.stops[turns.roles == ROLES.index("assistant")] - 1
        return places

    def _turns(self, ids: npt.NDArray[np.int64]) -> _Turns:
        starts, stops, roles = [_NO_IDS], [_NO_IDS], [_NO_ROLES]
        for first, headers in self._by_first:
            candidates = np.flatnonzero(ids == first)
            if not len(candidates):
                continue
            for header, role_id in headers:
                found = candidates[: np.searchsorted(candidates, len(ids) - len(header), side="right")]
                for offset in range(1, len(header)):
                    found = found[ids[found + offset] == header[offset]]
                starts.append(found)
                stops.append(found + len(header))
                roles.append(np.full(len(found), role_id, dtype=np.uint8))
        return _outermost(_Turns(np.concatenate(starts), np.concatenate(stops), np.concatenate(roles)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; `from_dict` reads them."""
        return {
            "headers": {role: [list(header) for header in self.headers(role)] for role in ROLES},
            "preamble": self.preamble,
            "reason": self.reason,
        }

    @classmethod
    def from_dict(cls, value: object) -> RoleMap:
        """Read what `to_dict` wrote. Raises CalibrationError."""
        fields = _fields(value, "chat roles", ("headers", "preamble", "reason"))
        headers = _fields(fields["headers"], "chat roles, headers", ROLES)
        preamble, reason = fields["preamble"], fields["reason"]
        if preamble is not None and preamble not in ROLES:
            raise CalibrationError(f"chat roles: preamble is {preamble!r}, expected null or one of {', '.join(ROLES)}")
        if not isinstance(reason, str):
            raise CalibrationError(f"chat roles: reason is a {type(reason).__name__}, expected a string")
        system, user, assistant = (_headers_from(headers[role], role) for role in ROLES)
        return cls(system, user, assistant, preamble, reason)


_NO_IDS: npt.NDArray[np.int64] = np.zeros(0, dtype=np.int64)
_NO_ROLES: npt.NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)


def _as_array(token_ids: TokenIds) -> npt.NDArray[np.int64]:
    ids: npt.NDArray[np.int64] = np.asarray(token_ids, dtype=np.int64)
    assert ids.ndim == 1, ids.shape
    return ids


def _outermost(turns: _Turns) -> _Turns:
    order = np.lexsort((-turns.stops, turns.starts))
    starts, stops, roles = turns.starts[order], turns.stops[order], turns.roles[order]
    outer = np.ones(len(starts), dtype=bool)
    outer[1:] = stops[1:] > np.maximum.accumulate(stops)[:-1]
    return _Turns(starts[outer], stops[outer], roles[outer])


def _fields(value: object, what: str, names: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != set(names):
        found = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise CalibrationError(f"{what}: found {found}, expected an object of {', '.join(names)}")
    return value


def _headers_from(value: object, role: Role) -> tuple[Ids, ...]:
    def of_ids(header: object) -> bool:
        return isinstance(header, list) and all(type(token) is int and token >= 0 for token in header)

    if not isinstance(value, list) or not all(map(of_ids, value)):
        raise CalibrationError(f"chat roles: headers of `{role}` are not lists of token ids")
    return tuple(tuple(header) for header in value)


# Discovery. Contents are told from the template by changing them: a changed beginning shows where a content begins, a
# changed end where it ends. Beginnings and ends of many kinds, because a tokenizer may merge what meets.

_SOLID = ("x", "The ", "7", "(", "é", "我")
_BLANK = ("\n", "\n\n\n", " ", "\t")
_PLAIN: Mapping[Role, str] = {"system": "Alpha lamp", "user": "Beta stone", "assistant": "Gamma river"}
# None of them may begin with what `_SOLID` adds, or be as the template itself writes.
_WITNESSES = (
    "Delta.\n\nuser\nassistant\nsystem: model\n\n### Title: more\n\n\n- a list\n- and its end",
    "Kilo",
    "Short words, 12 of them\tand <tags>\n</tags>: «où»? 猫\n",
)
# What clients may ask of templates that know it; others do not look.
_THINKING: tuple[Mapping[str, bool], ...] = ({}, *({"enable_thinking": on, "thinking": on} for on in (True, False)))

Message = tuple[Role, str]


class _UntoldError(Exception):
    """The headers cannot be told; says why."""


class _Gap(NamedTuple):
    """What a template writes before a content."""

    tokens: Ids
    certain: int
    """How many of them stay what they are when the content begins with white space, which may merge with the rest."""

    def after(self, end: int) -> _Gap:
        return _Gap(self.tokens[end:], max(0, self.certain - end))


class _Placed(NamedTuple):
    """A rendered conversation, and where its contents are."""

    ids: Ids
    gaps: tuple[_Gap, ...]
    """What stands before each content."""
    spans: tuple[tuple[int, int], ...]
    """First token of each content, and one past its last."""

    @property
    def tail(self) -> Ids:
        """What stands after the last content."""
        return self.ids[self.spans[-1][1] :]


class _Chat:
    """A tokenizer's chat template; `in_parts` for one that takes contents as lists of parts, as with images."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, in_parts: bool) -> None:
        self._tokenizer = tokenizer
        self._in_parts = in_parts
        self._bos: int | None = tokenizer.bos_token_id
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self._blank: dict[int, bool] = {}

    def render(self, messages: Iterable[Message], generation: bool = False, **options: bool) -> Ids:
        """The token ids of a conversation. Raises _UntoldError where the template refuses it."""
        from jinja2 import TemplateError

        conversation = [{"role": role, "content": self._content(text)} for role, text in messages]
        try:
            rendered = self._tokenizer.apply_chat_template(
                conversation, add_generation_prompt=generation, tokenize=True, return_dict=True, **options
            )
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError) as error:
            turns = ", ".join(message["role"] for message in conversation)
            raise _UntoldError(f"the chat template refuses the turns {turns} ({type(error).__name__})") from error
        return tuple(rendered["input_ids"])

    def _content(self, text: str) -> Any:
        return [{"type": "text", "text": text}] if self._in_parts else text

    def place(self, messages: Sequence[Message], generation: bool = False) -> _Placed:
        """A rendered conversation with its contents found. Raises _UntoldError."""
        ids = self.render(messages, generation)
        gaps, spans, before = [], [], 0
        for slot, (role, content) in enumerate(messages):

            def changed(text: str, slot: int = slot, role: Role = role) -> Ids:
                return self.render([*messages[:slot], (role, text), *messages[slot + 1 :]], generation)

            first = min(_common(ids, changed(start + content)) for start in _SOLID)
            certain = min(first, *(_common(ids, changed(start + content)) for start in _BLANK))
            end = len(ids) - min(_common(ids[::-1], changed(content + end)[::-1]) for end in _SOLID)
            if not before <= first < end:
                raise _UntoldError(f"the chat template does not write the {role}'s words once, after those before them")
            gaps.append(_Gap(ids[before:first], max(0, certain - before)))
            spans.append((first, end))
            before = end
        return _Placed(ids, tuple(gaps), tuple(spans))

    def placed_roles(self, *roles: Role) -> _Placed:
        return self.place([(role, f"{_PLAIN[role]} {place}") for place, role in enumerate(roles)])

    def without_bos(self, gap: _Gap, preface: Ids = ()) -> _Gap:
        """The gap without the begin-of-text token, or without all of `preface` if it begins so."""
        end = len(preface) if _begins_with(gap.tokens, preface) else 0
        while end < len(gap.tokens) and gap.tokens[end] == self._bos:
            end += 1
        return gap.after(end)

    def added(self, token: int) -> bool:
        """Whether the token is one that text is not merged into."""
        return token in self._added

    def blank(self, token: int) -> bool:
        """Whether the token is white space only."""
        if token not in self._blank:
            text: str = self._tokenizer.decode([token])
            self._blank[token] = not self.added(token) and not text.strip()
        return self._blank[token]

    def forms(self, gap: _Gap) -> Iterator[Ids]:
        """The ways in which a header occurs, shortest first: white space around it may merge with what meets it."""
        tokens = gap.tokens
        start, end = 0, gap.certain
        while start < end and self.blank(tokens[start]):
            start += 1
        while start < end and self.blank(tokens[end - 1]):
            end -= 1
        if start < end:
            yield from (tokens[start:stop] for stop in range(end, len(tokens) + 1))


def _common(one: Ids, other: Ids) -> int:
    """How many first tokens two sequences share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _discover(chat: _Chat) -> list[RoleMap]:
    """The maps that the template suggests, the most telling first. Raises _UntoldError."""
    asked = chat.placed_roles("user")
    answered = chat.placed_roles("user", "assistant")
    resumed = chat.placed_roles("user", "assistant", "user")
    # What a template writes after its last content ends the turn, or begins the assistant's (Mistral's [/INST]).
    ends = (asked.tail, answered.tail)
    user = _header(chat, resumed.gaps[2], ends)
    assistant = _header(chat, resumed.gaps[1], ends)

    # Llama-2 begins every turn of the user's with <s>, which its system prompt shares.
    user = chat.without_bos(user)
    users = dict.fromkeys(chat.forms(user))
    if not any(_ends_with(asked.gaps[0].tokens, form) for form in users):
        users |= dict.fromkeys(chat.forms(chat.without_bos(asked.gaps[0])))
    naming = _Naming.of(chat, user.tokens, assistant.tokens)
    # The last answer may begin otherwise than earlier ones: with thinking, or the sign that there is none.
    last = _header(chat, answered.gaps[1], ends)
    assistants = _assistant_forms(chat, [*naming.headers(assistant.tokens), assistant, last])
    if not users or not assistants or users.keys() & assistants.keys():
        raise _UntoldError("the chat template begins turns of user and assistant alike")
    bare = RoleMap((), tuple(users), tuple(assistants))
    preface = asked.gaps[0].tokens
    preface = preface[: min((len(preface) - len(form) for form in users if _ends_with(preface, form)), default=0)]
    instructed = _with_system(chat, bare, naming, preface)
    return [bare] if instructed is None else [instructed, bare]


class _Naming(NamedTuple):
    """How a template writes the name of a role, where its headers differ in that only: `<|im_start|>NAME\\n`."""

    head: Ids
    """What stands before the name; empty, as `foot`, where headers are not written so."""
    foot: Ids
    longest: int
    """Of a whole header, in tokens."""

    @classmethod
    def of(cls, chat: _Chat, user: Ids, assistant: Ids) -> _Naming:
        head = start = _common(user, assistant)
        foot = len(user)
        while foot > start + 1 and (chat.added(user[foot - 1]) or chat.blank(user[foot - 1])):
            foot -= 1
        if not head or foot in (start, len(user)):
            return cls((), (), 0)
        return cls(user[:head], user[foot:], len(user) + 8)

    def headers(self, tokens: Ids) -> Iterator[_Gap]:
        """Every header of this kind among the tokens."""
        at = 0
        while self.head and at < len(tokens):
            name = at + len(self.head)
            rest = tokens[name + 1 : at + self.longest] if _begins_with(tokens[at:], self.head) else ()
            stop = _first(rest, self.foot)
            if stop is None:
                at += 1
                continue
            end = name + 1 + stop + len(self.foot)
            yield _Gap(tokens[at:end], end - at)
            at = end


def _header(chat: _Chat, gap: _Gap, ends: Iterable[Ids]) -> _Gap:
    """What of a gap between two turns begins the second: all but the end of the first, if that leaves something."""
    left = (gap.after(_common(gap.tokens, end)) for end in ends)
    return min((rest for rest in left if any(chat.forms(rest))), key=lambda rest: len(rest.tokens), default=gap)


def _assistant_forms(chat: _Chat, written: Iterable[_Gap]) -> dict[Ids, None]:
    """The forms of the assistant's headers: those written before answers, and those of generation prompts."""
    asked: list[Message] = [("user", _PLAIN["user"])]
    forms = dict.fromkeys(form for gap in written for form in chat.forms(gap))
    for options in _THINKING:
        try:
            without, prompt = chat.render(asked, **options), chat.render(asked, generation=True, **options)
        except _UntoldError:
            continue
        added = prompt[_common(without, prompt) :]
        forms |= dict.fromkeys(chat.forms(_Gap(added, len(added))))

    # White space after what the generation prompt ends with is the answer's own.
    prompt = chat.render(asked, generation=True)
    whole = max((form for form in forms if _ends_with(prompt, form)), key=len, default=None)
    if whole is None:
        return forms
    return {
        form: None
        for form in forms
        if form == whole or not _begins_with(form, whole) or not all(map(chat.blank, form[len(whole) :]))
    }


def _with_system(chat: _Chat, bare: RoleMap, naming: _Naming, preface: Ids) -> RoleMap | None:
    """The same map with system turns, if the template has turns for them.

    Args:
        preface: what stands before the header of a conversation that the user begins.
    """
    try:
        before, between = chat.placed_roles("system", "user").gaps
    except _UntoldError:
        return None
    users = bare.user
    if not any(_ends_with(between.tokens, form) for form in users):
        users = tuple(dict.fromkeys([*users, *chat.forms(between)]))
    own = chat.without_bos(before, preface)
    if not own.tokens:
        return RoleMap((), users, bare.assistant, preamble="system")
    headers = list(naming.headers(before.tokens)) or _unnamed(chat, own, naming)
    forms = dict.fromkeys(form for header in headers for form in chat.forms(header))
    if not set(forms) - set(bare.user):
        # Where the template opens a user's turn around the system prompt; perhaps with more of its own text.
        forms = dict.fromkeys(chat.forms(own))
    system = tuple(form for form in forms if form not in users)
    return RoleMap(system, users, bare.assistant) if system and not set(system) & set(bare.assistant) else None


def _unnamed(chat: _Chat, before: _Gap, naming: _Naming) -> list[_Gap]:
    """The system prompt's header where it cannot be told by the role's name: the added tokens that come first."""
    tokens = before.tokens
    if naming.head:
        return [before] if len(tokens) <= naming.longest else []
    end = next((i for i, token in enumerate(tokens) if not chat.added(token)), len(tokens))
    if not end:
        return [before]
    while end < len(tokens) and chat.blank(tokens[end]):
        end += 1
    return [_Gap(tokens[:end], min(end, before.certain))]


def _begins_with(tokens: Ids, part: Ids) -> bool:
    return tokens[: len(part)] == part


def _ends_with(tokens: Ids, part: Ids) -> bool:
    return tokens[-len(part) :] == part


def _first(tokens: Ids, part: Ids) -> int | None:
    return next((i for i in range(len(tokens) - len(part) + 1) if _begins_with(tokens[i:], part)), None)


def _holds(found: RoleMap, chat: _Chat) -> bool:
    """Whether the map is right for longer conversations, whose contents look like headers as text can."""
    turns: list[Role] = ["user", "assistant", "user", "assistant", "user"]
    has_system = bool(found.system or found.preamble)
    for witness in _WITNESSES:
        if not _agrees(found, chat.place(_conversation(turns, witness), generation=True), turns):
            return False
        try:
            instructed = chat.place(_conversation(["system", *turns], witness), generation=True)
        except _UntoldError:
            # The template refuses system prompts, or writes them into a later turn of the user (Mistral).
            if has_system:
                return False
            continue
        if not _agrees(found, instructed, ["system" if has_system else "user", *turns]):
            return False
    return True


def _conversation(roles: Iterable[Role], text: str) -> list[Message]:
    return [(role, f"{text}{place}") for place, role in enumerate(roles)]


def _agrees(found: RoleMap, placed: _Placed, roles: Sequence[Role]) -> bool:
    """Whether each content has its role, and what stands between two has the one's, then the other's."""
    ids = [ROLES.index(role) for role in roles]
    told = found.roles(placed.ids)
    if any((told[first:end] != role).any() for (first, end), role in zip(placed.spans, ids, strict=True)):
        return False
    for ((_, end), (first, _)), role, following in zip(pairwise(placed.spans), ids, ids[1:], strict=False):
        gap = told[end:first]
        changes = np.flatnonzero(np.diff(gap))
        if len(gap) and (gap[-1] != following or len(changes) > 1 or (len(changes) and gap[0] != role)):
            return False
    decisions = found.decisions(placed.ids)
    return bool(len(decisions) == roles.count("assistant") + 1 and decisions[-1] == len(placed.ids) - 1)
