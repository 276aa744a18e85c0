/** Conversations: kept in the browser's storage, exported to files, checked when they come back. */

/** @typedef {import("./tokens.js").Score} Score
 * @typedef {{tokens: number, prompt: number, first: number, rate: number, seed: number}} Stats
 * @typedef {{role: "user"|"assistant", text: string, scores?: Score[], finish?: string,
 *   error?: string, stats?: Stats}} Message
 * @typedef {{id: string, title: string, mode: "chat"|"text", system: string, changed: number,
 *   messages: Message[]}} Conversation */

export const PREFIX = "nanojaxgpt:"; // other pages of this origin share its storage
const OWN = `${PREFIX}conversation:`;
const FILE_FORMAT = "nanojaxgpt conversations";
const FILE_BYTES = 20e6;

/** @type {Map<string, Conversation>} */
const conversations = new Map();

/** Return a new conversation without messages, which is not stored yet. @returns {Conversation} */
export function emptyConversation(mode) {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2);
  return { id, title: "", mode, system: "", changed: Date.now(), messages: [] };
}

/** Return all conversations, the latest first. */
export const sorted = () => [...conversations.values()].sort((a, b) => b.changed - a.changed);

export const store = (key, value) => localStorage.setItem(key, JSON.stringify(value));

/** Store a conversation under its own key, so tabs don't overwrite each other's. May throw. */
export function save(conversation) {
  if (!conversation.messages.length) return;
  conversations.set(conversation.id, conversation);
  for (;;) {
    try {
      return store(OWN + conversation.id, conversation);
    } catch {
      dropOldestScores(conversation);
    }
  }
}

/** Make room: token probabilities are most of the bytes, and the oldest go first. */
function dropOldestScores(saving) {
  const hasScores = ({ messages }) => messages.some(({ scores }) => scores?.length);
  const oldest = sorted().reverse().find(hasScores);
  if (!oldest) throw new Error("The browser's storage is full. Export and delete conversations.");
  for (const message of oldest.messages) if (message.scores) message.scores = [];
  if (oldest !== saving) store(OWN + oldest.id, oldest);
}

export function remove(conversation) {
  conversations.delete(conversation.id);
  localStorage.removeItem(OWN + conversation.id);
}

/** Read what is stored; a broken entry is left alone. */
export function loadConversations() {
  for (const key of Object.keys(localStorage).filter((name) => name.startsWith(OWN))) load(key);
}

function load(key) {
  try {
    const value = JSON.parse(localStorage.getItem(key));
    const { id, changed } = value;
    conversations.set(id, { ...checkConversation(value, key), id, changed });
  } catch (error) {
    console.warn(`${key} can't be read: ${error.message}`);
  }
}

/** Call `changed(id)` when another tab has stored or deleted a conversation. */
export function followOtherTabs(changed) {
  addEventListener("storage", ({ key, newValue }) => {
    if (!key?.startsWith(OWN)) return;
    if (newValue) load(key);
    else conversations.delete(key.slice(OWN.length));
    changed(key.slice(OWN.length));
  });
}

export const conversationOf = (id) => conversations.get(id);

/** Return the conversations of an exported file. Throws an Error that says what is wrong. */
export function readConversations(text) {
  let file;
  try {
    file = JSON.parse(text);
  } catch {
    throw new Error("it is not JSON");
  }
  if (file?.format !== FILE_FORMAT) throw new Error(`its "format" is not "${FILE_FORMAT}"`);
  if (!Array.isArray(file.conversations)) throw new Error('"conversations" is not a list');
  return file.conversations.map((value, i) => checkConversation(value, `conversation ${i + 1}`));
}

/** Return a conversation with these values and a new id. @returns {Conversation} */
function checkConversation(value, where) {
  const check = (right, what) => {
    if (!right) throw new Error(`${where}: ${what}`);
  };
  check(typeof value?.title === "string", '"title" is not text');
  check(["chat", "text"].includes(value.mode), '"mode" is neither "chat" nor "text"');
  check(typeof value.system === "string", '"system" is not text');
  check(Array.isArray(value.messages), '"messages" is not a list');
  const messages = value.messages.map((message, i) => {
    const { role, text, scores = [], finish = "", error = "", stats } = message ?? {};
    const place = `message ${i + 1}`;
    check(["user", "assistant"].includes(role), `${place}: "role" is not user or assistant`);
    check(typeof text === "string", `${place}: "text" is not text`);
    check(isScores(scores), `${place}: "scores" are not tokens with log-probabilities`);
    check(Object.values(stats ?? {}).every(Number.isFinite), `${place}: "stats" are not numbers`);
    return { role, text, scores, finish: String(finish), error: String(error), stats };
  });
  return { ...emptyConversation(value.mode), title: value.title, system: value.system, messages };
}

function isScores(scores) {
  const isList = (value, isItem) => Array.isArray(value) && value.every(isItem);
  const isPair = (value) => Array.isArray(value) && typeof value[0] === "string"
    && Number.isFinite(value[1]);
  return isList(scores, (score) => isPair(score) && isList(score[2], isPair));
}

/** Store the conversations of a file; return them. Throws an Error: then nothing was stored. */
export async function importFile(file) {
  if (file.size > FILE_BYTES) throw new Error(`it is larger than ${FILE_BYTES / 1e6} MB`);
  const read = readConversations(await file.text()).filter(({ messages }) => messages.length);
  if (!read.length) throw new Error("it has no messages");
  read.forEach(save);
  return read;
}

/** Let the browser save conversations to a file. */
export function exportFile(chosen) {
  const content = { format: FILE_FORMAT, version: 1, conversations: chosen };
  const title = chosen.length === 1 ? chosen[0].title : "conversations";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)]));
  link.download = `${title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 40)}.json`;
  link.click();
  URL.revokeObjectURL(link.href);
}
