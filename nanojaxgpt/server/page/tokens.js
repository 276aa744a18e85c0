/** The tokens of an answer: which piece of its text each wrote, and what else was likely there. */

/** A token, its log-probability, and the likeliest tokens at its place, the likeliest first.
 * @typedef {[token: string, logprob: number, alternatives: [string, number][]]} Score */

const LEVELS = [0.5, 0.2, 0.05, 0.01]; // a token less likely than these has the tint 1, 2, 3, 4
const MARGIN = 8; // pixels between the tip and the edge of the window

/** Return the scores in the `logprobs` of a chat's choice or a completion's. @returns {Score[]} */
export function readScores(logprobs) {
  const round = (value) => Math.round((value ?? 0) * 1e4) / 1e4;
  if (logprobs?.content) {
    return logprobs.content.map(({ token, logprob, top_logprobs }) => [
      token, round(logprob), top_logprobs.map((other) => [other.token, round(other.logprob)]),
    ]);
  }
  return (logprobs?.tokens ?? []).map((token, i) => [
    token, round(logprobs.token_logprobs[i]),
    Object.entries(logprobs.top_logprobs?.[i] ?? {})
      .map(([other, value]) => [other, round(value)]).sort((a, b) => b[1] - a[1]),
  ]);
}

/**
 * Cut a text into the pieces that its tokens wrote; `from` and `to` bound the scores of a piece.
 * A token that is not found, such as a part of a character, shares a piece with its neighbours.
 * @param {string} text @param {Score[]} scores
 * @returns {{text: string, from: number, to: number}[]}
 */
export function alignTokens(text, scores) {
  const pieces = [];
  let cursor = 0, from = 0, slack = 0;
  const add = (end, to) => {
    if (end > cursor) pieces.push({ text: text.slice(cursor, end), from, to });
    [cursor, from, slack] = [end, to, 0];
  };
  scores.forEach(([token], index) => {
    const at = token ? text.slice(cursor, cursor + slack + token.length).indexOf(token) : -1;
    if (at < 0) {
      // As the server writes a part of a character: bytes:\xf0\x9f
      slack += token.startsWith("bytes:") ? token.split("\\x").length : token.length;
      return;
    }
    if (at > 0) add(cursor + at, index);
    from = index;
    add(cursor + token.length, index + 1);
  });
  add(text.length, scores.length);
  return pieces;
}

/** Draw a text as one element per token; the elements that are right already stay. */
export function drawTokens(node, text, scores) {
  const pieces = alignTokens(text, scores);
  pieces.forEach((piece, i) => {
    const part = node.children[i] ?? node.appendChild(document.createElement("span"));
    if (part.textContent !== piece.text) drawPiece(part, piece.text);
    const own = scores.slice(piece.from, piece.to);
    part.piece = { score: own[0], from: piece.from };
    part.dataset.level = own.length ? levelOf(Math.min(...own.map((score) => score[1]))) : 0;
  });
  while (node.children.length > pieces.length) node.lastElementChild.remove();
  node.tabIndex = scores.length ? 0 : -1;
}

/** Draw a piece; the space before a word has no tint. */
function drawPiece(part, text) {
  const [, space, word] = /^(\s*)(.*)$/s.exec(text);
  const bold = document.createElement("b");
  bold.textContent = word || space;
  part.replaceChildren(...(word && space ? [space, bold] : [bold]));
}

const probability = (logprob) => Math.exp(Math.min(0, logprob));
const levelOf = (logprob) => LEVELS.filter((least) => probability(logprob) < least).length;

function percent(logprob) {
  const value = 100 * probability(logprob);
  return value < 0.01 ? "< 0.01 %" : `${value < 9.95 ? value.toPrecision(2) : value.toFixed(0)} %`;
}

/** Return whether a token is text, not a part of a character nor a control token such as </s>. */
const isText = (token) => !/^bytes:|^<[|/]?\w+\|?>$/.test(token);

/** Return a token with its spaces and line breaks visible. */
const visible = (token) =>
  token.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "→") || "(nothing)";

/**
 * Connect the answers in `log` with the element that shows a token's alternatives: the pointer
 * and the arrow keys choose a token; a click or Enter keeps the tip open, to choose another token
 * by `branch(part, [token, logprob])`. `enabled` says whether tips are wanted.
 */
export function connectTip(log, tip, enabled, branch) {
  const partAt = (event) => event.target.closest(".assistant .text > span");
  const kept = () => tip.classList.contains("kept");
  const over = (event) => {
    if (kept() || !enabled()) return;
    if (partAt(event)) showTip(tip, partAt(event), branch);
    else hideTip(tip);
  };
  const keep = (part) => {
    hideTip(tip);
    if (!part || !enabled() || String(getSelection())) return;
    showTip(tip, part, branch);
    tip.classList.add("kept");
  };
  log.addEventListener("pointerover", over);
  log.addEventListener("pointerleave", () => kept() || hideTip(tip));
  log.addEventListener("click", (event) => keep(partAt(event)));
  log.addEventListener("keydown", (event) => {
    if (!event.target.matches(".assistant .text") || !enabled()) return;
    const shown = event.target.querySelector(".shown");
    if (event.key === "Enter" && shown) {
      event.preventDefault();
      keep(shown);
      rowsOf(tip)[0]?.focus();
    } else walk(event, tip, branch);
  });
  tip.addEventListener("keydown", (event) => {
    const rows = rowsOf(tip), at = rows.indexOf(document.activeElement);
    rows[at + ({ ArrowDown: 1, ArrowUp: -1 }[event.key] ?? 0)]?.focus();
  });
}

const rowsOf = (tip) => [...tip.querySelectorAll("button:enabled")];

/** Show the next or the previous token of an answer. */
function walk(event, tip, branch) {
  const parts = [...event.target.children];
  const steps = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity };
  if (!(event.key in steps)) return;
  event.preventDefault();
  const at = parts.findIndex((part) => part.classList.contains("shown"));
  showTip(tip, parts[Math.max(0, Math.min(parts.length - 1, at + steps[event.key]))], branch);
}

function showTip(tip, part, branch) {
  hideTip(tip);
  if (!part.piece?.score) return;
  const [token, logprob, alternatives] = part.piece.score;
  const others = alternatives.filter(([other]) => other !== token);
  const rows = [[token, logprob], ...others].sort((a, b) => b[1] - a[1]);
  tip.replaceChildren(...rows.map((row) => {
    const button = tipRow(row, row[0] === token);
    button.addEventListener("click", () => branch(part, row));
    return button;
  }));
  tip.hidden = false;
  part.classList.add("shown");
  part.scrollIntoView({ block: "nearest" });
  place(tip, part.lastElementChild.getClientRects()[0]);
}

/** Hide the tip; return whether it was shown. */
export function hideTip(tip) {
  const wasShown = !tip.hidden, part = document.querySelector(".shown");
  if (tip.contains(document.activeElement)) part?.parentElement.focus();
  tip.hidden = true;
  tip.classList.remove("kept");
  part?.classList.remove("shown");
  return wasShown;
}

function tipRow([token, logprob], chosen) {
  const row = document.createElement("button");
  const [bar, name, value] = ["i", "code", "span"].map((tag) => document.createElement(tag));
  name.textContent = visible(token);
  value.textContent = percent(logprob);
  bar.style.width = `${100 * probability(logprob)}%`;
  row.append(bar, name, value);
  row.disabled = chosen || !isText(token);
  row.classList.toggle("chosen", chosen);
  return row;
}

function place(tip, box) {
  const left = Math.min(box.left, innerWidth - tip.offsetWidth - MARGIN);
  const below = box.bottom + MARGIN + tip.offsetHeight < innerHeight;
  const top = below ? box.bottom + 6 : Math.max(MARGIN, box.top - tip.offsetHeight - 6);
  tip.style.left = `${Math.max(MARGIN, left)}px`;
  tip.style.top = `${top}px`;
}
