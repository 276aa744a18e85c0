/**
 * The page: conversations with the model that this server has open.
 *
 * Modules without a build step or a dependency. Whatever a model, a server or a file says reaches
 * the document as text only (`textContent`). In order: answers, messages, notices, conversation
 * list, settings, panels and keys, start.
 */

import * as conversations from "./conversations.js";
import { listModels, post, tokenize, watchQueue } from "./server.js";
import { change, settings, showSettings } from "./settings.js";
import { readEvents } from "./stream.js";
import { alignTokens, connectTip, drawTokens, hideTip, readScores } from "./tokens.js";

/** @typedef {import("./conversations.js").Conversation} Conversation
 * @typedef {import("./conversations.js").Message} Message */

const { sorted } = conversations;
const ALTERNATIVES = 5;
const TITLE_LENGTH = 60;
const NARROW = matchMedia("(max-width: 800px)"); // panels lie over the conversation; see page.css
const IDEAS = {
  chat: ["Why is the sky blue?", "Write a haiku about the sea.", "Explain entropy to a child."],
  text: ["Once upon a time, there was", "The three laws of motion are", "def fibonacci(n):"],
};

/** @type {Conversation} */
let current;
/** @type {{conversation: Conversation, answer: Message, controller: AbortController} | null} */
let running = null;
let models = [];

const find = (id) => document.getElementById(id);
const clone = (id) => find(id).content.firstElementChild.cloneNode(true);

// ---------------------------------------------------------------------------------- answers

/** Let the model write on in `answer`, the last message of the conversation. */
async function generate(conversation, answer) {
  const controller = new AbortController();
  const seed = settings.seed === "" ? Math.floor(Math.random() * 2 ** 31) : Number(settings.seed);
  const counts = { tokens: 0, prompt: 0, first: 0, last: 0, sent: 0 };
  running = { conversation, answer, controller };
  answer.scores.length = alignTokens(answer.text, answer.scores).at(-1)?.to ?? 0;
  [answer.finish, answer.error, answer.stats] = ["", "", undefined];
  conversation.changed = Date.now();
  keep(conversation);
  draw();
  scrollDown();
  const stopWatching = watchQueue();
  try {
    const [path, body] = await answerRequest(conversation, answer, controller.signal);
    const { response, sent } = await postAnswer(path, { ...body, seed }, controller.signal);
    counts.sent = sent;
    for await (const event of readEvents(response)) {
      if (event.data === "[DONE]") break;
      stopWatching();
      takeChunk(answer, event, counts);
      drawSoon();
    }
    if (!answer.finish) throw new Error("The connection ended before the answer did.");
  } catch (error) {
    if (controller.signal.aborted) answer.finish = "stopped";
    else answer.error = error.message;
  }
  stopWatching();
  if (counts.tokens) answer.stats = { ...statsOf(counts), seed };
  running = null;
  if (conversations.conversationOf(conversation.id)) keep(conversation); // else it was deleted
  following(draw);
}

/** Request an answer; where the context is too short for its limit, as long as there is room. */
async function postAnswer(path, body, signal) {
  try {
    return await post(path, body, signal);
  } catch (error) {
    const room = error.code === "context_length_exceeded" ? await roomAfter(body, signal) : 0;
    if (!(room > 0)) throw error;
    return post(path, { ...body, max_tokens: room }, signal);
  }
}

async function roomAfter({ model, prompt, messages }, signal) {
  const ids = Array.isArray(prompt) ? prompt : await tokenize(model, { prompt, messages }, signal);
  return chosenModel().max_model_len - ids.length;
}

function statsOf({ tokens, prompt, first, last, sent }) {
  const seconds = (last - first) / 1000, rate = seconds ? (tokens - 1) / seconds : 0;
  return { tokens, prompt, first: Math.round(first - sent), rate };
}

/** Return the path and the body of the request for an answer. */
async function answerRequest({ mode, system, messages }, answer, signal) {
  const { temperature, top_p, top_k, min_p, max_tokens, stops } = settings;
  const body = { model: chosenModel()?.id, temperature, top_p, top_k, min_p, max_tokens };
  const stop = stops.split("\n").filter(Boolean).map((line) => line.replaceAll("\\n", "\n"));
  Object.assign(body, { stream: true, stream_options: { include_usage: true } });
  if (stop.length) body.stop = stop;
  const completion = (prompt) => ["/v1/completions", { ...body, prompt, logprobs: ALTERNATIVES }];
  if (mode === "text") return completion(messages.map(({ text }) => text).join(""));
  const turns = messages.filter((message) => message !== answer)
    .map(({ role, text }) => ({ role, content: text }));
  if (system) turns.unshift({ role: "system", content: system });
  if (!answer.text) {
    const scores = { logprobs: true, top_logprobs: ALTERNATIVES };
    return ["/v1/chat/completions", { ...body, ...scores, messages: turns }];
  }
  // An answer that has begun is continued as a text: the turns, then what there is of it.
  const begun = { prompt: answer.text, add_special_tokens: false };
  const parts = [{ messages: turns }, begun].map((part) => tokenize(body.model, part, signal));
  return completion((await Promise.all(parts)).flat());
}

/** Add an event of the stream to the answer. */
function takeChunk(answer, { event, data }, counts) {
  const chunk = JSON.parse(data);
  if (chunk.error || event === "error") {
    throw new Error(chunk.error?.message ?? chunk.message ?? "The server reports an error.");
  }
  const choice = chunk.choices?.[0];
  const text = choice?.text ?? choice?.delta?.content ?? "";
  const scores = readScores(choice?.logprobs);
  if (text || scores.length) {
    counts.last = performance.now();
    counts.first ||= counts.last;
    counts.tokens += scores.length || 1;
    answer.text += text;
    answer.scores.push(...scores);
  }
  if (choice?.finish_reason) answer.finish = choice.finish_reason;
  if (chunk.usage) {
    [counts.prompt, counts.tokens] = [chunk.usage.prompt_tokens, chunk.usage.completion_tokens];
  }
}

/** Send a message; without one, a text is continued. */
function send(text) {
  if (!text && (current.mode === "chat" || !current.messages.length)) return;
  const title = text.trim().replace(/\s+/g, " ").slice(0, TITLE_LENGTH);
  current.title ||= title || "Untitled";
  if (text) current.messages.push({ role: "user", text });
  answerLast();
}

/** Let the model answer the last message, or write on in its own. */
function answerLast() {
  if (current.messages.at(-1)?.role !== "assistant") {
    current.messages.push({ role: "assistant", text: "", scores: [] });
  }
  generate(current, current.messages.at(-1));
}

/** Replace the messages from `index` on, and answer; the notice offers to take it back. */
function replaceFrom(index, replacement, notice) {
  const conversation = current, before = structuredClone(current.messages);
  current.messages.splice(index, Infinity, ...replacement);
  answerLast();
  showNotice(notice, () => {
    if (running?.conversation === conversation) stop();
    conversation.messages = before;
    keep(conversation);
    show(conversation);
  });
}

/** Take another token at a place of an answer, and let the model continue from there. */
function branch(part, [token, logprob]) {
  if (running) return;
  const index = [...find("log").children].indexOf(part.closest("article"));
  const { text, scores } = current.messages[index];
  const { from, score } = part.piece;
  const before = alignTokens(text, scores).filter((piece) => piece.from < from);
  replaceFrom(index, [{
    role: "assistant",
    text: before.map((piece) => piece.text).join("") + token,
    scores: [...scores.slice(0, from), [token, logprob, score[2]]],
  }], "The answer goes on from another token.");
}

const stop = () => running?.controller.abort();

/** Keep what there is of an answer when the page is left. */
function leave() {
  if (!running) return;
  running.answer.finish = "stopped";
  keep(running.conversation);
}

// --------------------------------------------------------------------------------- messages

/** Draw the page for the current conversation. */
function draw() {
  hideTip(find("tip"));
  document.body.dataset.mode = current.mode;
  document.body.classList.toggle("tints", settings.tints);
  find("title").textContent = current.title || "New conversation";
  document.title = current.title ? `${current.title} - nanojaxgpt` : "nanojaxgpt";
  const focused = find("log").contains(document.activeElement);
  find("log").replaceChildren(...current.messages.map(messageNode));
  if (focused) find("scroll").focus({ preventScroll: true });
  drawWelcome();
  drawControls();
  drawList();
}

/** Draw, and stay at the end of the conversation if it is in view. */
function following(drawing) {
  const scroll = find("scroll");
  const follows = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  drawing();
  if (follows) scrollDown();
}

const scrollDown = () => { find("scroll").scrollTop = find("scroll").scrollHeight; };

function drawControls() {
  const here = running?.conversation === current;
  find("log").setAttribute("aria-busy", here);
  find("stop").hidden = !running;
  find("send").hidden = Boolean(running);
  find("tokens").setAttribute("aria-pressed", settings.tints);
  find("system").value = current.system;
  find("input").placeholder = current.mode === "chat" ? "Message"
    : current.messages.length ? "More text, or nothing to continue" : "A text to continue";
  for (const radio of document.getElementsByName("mode")) {
    radio.checked = radio.value === current.mode;
    radio.disabled = radio.value === "chat" && !canChat();
    radio.parentElement.title = radio.disabled ? "This model has no chat template" : "";
  }
}

function drawWelcome() {
  const [title, text] = find("welcome").children;
  find("welcome").hidden = current.messages.length > 0;
  title.textContent = chosenModel()?.id ?? "nanojaxgpt";
  text.textContent = current.mode === "chat" ? "Ask it something."
    : "Begin a text; the model continues it.";
  find("ideas").replaceChildren(...IDEAS[current.mode].map((idea) => {
    const button = document.createElement("button");
    button.textContent = idea;
    button.addEventListener("click", () => setInput(idea));
    return button;
  }));
}

function messageNode(message, index) {
  const node = clone(`message-${message.role}`);
  node.replaceChildren(...node.children); // white space between them would show in a completion
  const act = {
    copy: () => copy(message.text),
    edit: () => edit(node, index),
    again: () => replaceFrom(index, [], "The answer was replaced."),
    more: answerLast,
  };
  for (const button of node.querySelectorAll("[data-action]")) {
    button.addEventListener("click", act[button.dataset.action]);
    button.disabled = Boolean(running) && button.dataset.action !== "copy";
  }
  node.classList.toggle("last", index === current.messages.length - 1);
  if (current.mode === "text" && message.role === "user") makeEditable(node, act.edit);
  drawMessage(node, message);
  return node;
}

/** Let a click on the text itself edit it: the buttons would tear a text apart. */
function makeEditable(node, act) {
  const text = node.querySelector(".text");
  Object.assign(text, { role: "button", tabIndex: 0, title: "Edit" });
  text.addEventListener("click", () => String(getSelection()) || act());
  text.addEventListener("keydown", (event) => event.key === "Enter" && act());
}

function drawMessage(node, message) {
  const text = node.querySelector(".text");
  if (message.role === "user") {
    text.textContent = message.text;
    return;
  }
  drawTokens(text, message.text, message.scores);
  const problem = node.querySelector(".problem");
  problem.hidden = !message.error;
  problem.textContent = message.error;
  node.classList.toggle("waiting", running?.answer === message);
  node.querySelector(".stats").textContent = describeStats(message);
}

function describeStats({ stats, finish }) {
  const parts = [];
  if (stats) {
    parts.push(`${stats.tokens} ${stats.tokens === 1 ? "token" : "tokens"}`);
    if (stats.prompt) parts.push(`prompt ${stats.prompt}`);
    parts.push(`first after ${(stats.first / 1000).toFixed(2)} s`);
    if (stats.rate) parts.push(`${stats.rate.toFixed(stats.rate < 10 ? 1 : 0)} tokens/s`);
    parts.push(`seed ${stats.seed}`);
  }
  if (finish === "length") parts.push("cut at max tokens");
  if (finish === "stopped") parts.push("stopped");
  return parts.map((part) => part.replaceAll(" ", "\u00a0")).join(" · ");
}

let drawing = 0;

/** Draw the running answer with the next frame. */
function drawSoon() {
  drawing ||= requestAnimationFrame(() => {
    drawing = 0;
    if (running?.conversation !== current) return;
    following(() => drawMessage(find("log").lastElementChild, running.answer));
  });
}

/** Edit a message in its place; what comes after it is replaced when it is sent. */
function edit(node, index) {
  const editor = clone("editor"), area = editor.querySelector("textarea");
  const close = () => {
    editor.remove();
    node.classList.remove("editing");
    node.querySelector(current.mode === "chat" ? "[data-action=edit]" : ".text").focus();
  };
  area.value = current.messages[index].text;
  area.addEventListener("input", () => fit(area));
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") close();
    if (sends(event)) editor.requestSubmit();
    if (sends(event)) event.preventDefault();
    event.stopPropagation();
  });
  editor.querySelector("[type=button]").addEventListener("click", close);
  editor.addEventListener("submit", (event) => {
    event.preventDefault();
    const message = { role: "user", text: area.value };
    if (area.value && !running) replaceFrom(index, [message], "Later messages were replaced.");
  });
  node.classList.add("editing");
  node.append(editor);
  fit(area);
  area.focus();
}

// ---------------------------------------------------------------------------------- notices

let noticeTimer = 0;

/** Say something for some seconds, and offer to undo it. */
function showNotice(text, undo = null) {
  const notice = find("notice"), [label, button] = notice.children;
  const hide = () => { notice.hidden = true; };
  label.textContent = text;
  button.hidden = !undo;
  button.onclick = () => {
    hide();
    undo();
  };
  notice.hidden = false;
  clearTimeout(noticeTimer);
  noticeTimer = setTimeout(hide, undo ? 10000 : 5000);
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    showNotice("Copied.");
  } catch {
    showNotice("The browser does not allow copying here; it needs https or localhost.");
  }
}

/** Store a conversation. */
function keep(conversation) {
  try {
    conversations.save(conversation);
  } catch (error) {
    showNotice(error.message);
  }
}

async function importFile(file) {
  try {
    const read = await conversations.importFile(file);
    show(read[0]);
    showNotice(read.length === 1 ? "Imported." : `Imported ${read.length} conversations.`);
  } catch (error) {
    showNotice(`${file.name} was not imported: ${error.message}`);
  }
}

// ------------------------------------------------------------------------ conversation list

function show(conversation) {
  current = conversation;
  closePanelOver();
  draw();
  scrollDown();
}

function startNew(mode = settings.mode) {
  const system = current?.system ?? "";
  show({ ...conversations.emptyConversation(canChat() ? mode : "text"), system });
  find("input").focus();
}

function drawList() {
  if (find("list").querySelector("input")) return; // a title is being edited
  find("list").replaceChildren(...sorted().map((conversation) => {
    const item = clone("item"), open = item.querySelector(".open");
    const [rename, remove] = item.querySelectorAll("[data-action]");
    open.textContent = conversation.title;
    if (conversation === current) open.setAttribute("aria-current", "true");
    rename.setAttribute("aria-label", `Rename ${conversation.title}`);
    remove.setAttribute("aria-label", `Delete ${conversation.title}`);
    open.addEventListener("click", () => show(conversation));
    rename.addEventListener("click", () => renameConversation(open, conversation));
    remove.addEventListener("click", () => deleteConversation(conversation));
    return item;
  }));
}

function renameConversation(open, conversation) {
  const input = document.createElement("input");
  input.value = conversation.title;
  input.setAttribute("aria-label", "Title");
  input.addEventListener("blur", () => {
    conversation.title = input.value.trim() || conversation.title;
    input.remove();
    keep(conversation);
    draw();
  }, { once: true });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Escape") input.value = "";
    if (event.key === "Enter" || event.key === "Escape") input.blur();
    event.stopPropagation();
  });
  open.replaceWith(input);
  input.select();
}

function deleteConversation(conversation) {
  if (running?.conversation === conversation) stop();
  conversations.remove(conversation);
  if (conversation === current) startNew();
  else draw();
  showNotice(`Deleted “${conversation.title}”.`, () => {
    keep(conversation);
    show(conversation);
  });
}

/** Show what another tab has changed. */
function takeChange(id) {
  if (id !== current.id || running) return drawList();
  current = conversations.conversationOf(id) ?? current;
  draw();
}

// --------------------------------------------------------------------------------- settings

const chosenModel = () => models.find((model) => model.id === find("model").value) ?? models[0];
const canChat = () => chosenModel()?.chat !== false;

function connectSettings() {
  showSettings();
  find("system").addEventListener("change", () => {
    current.system = find("system").value;
    keep(current);
  });
  find("tokens").addEventListener("click", () => {
    change({ tints: !settings.tints });
    draw();
  });
  find("mode").addEventListener("change", ({ target }) => {
    change({ mode: target.value });
    startNew();
  });
}

// -------------------------------------------------------------------------- panels and keys

/** Open the list or the settings, or close them. */
function openPanel(name) {
  const { panel } = document.body.dataset;
  following(() => { document.body.dataset.panel = name; });
  find("open-settings").setAttribute("aria-expanded", name === "settings");
  find("main").inert = Boolean(name) && NARROW.matches;
  if (name) find(`close-${name}`).focus();
  else if (panel) find(`open-${panel}`).focus();
}

function closePanelOver() {
  if (NARROW.matches && document.body.dataset.panel) openPanel("");
}

const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

/** Make an area as high as its text. */
function fit(area) {
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

function setInput(text) {
  find("input").value = text;
  fit(find("input"));
  find("input").focus();
}

function submit(event) {
  event.preventDefault();
  if (running) return;
  const text = find("input").value;
  setInput("");
  send(current.mode === "chat" ? text.trim() : text);
}

function escape() {
  const { panel } = document.body.dataset;
  if (hideTip(find("tip"))) return;
  if (running) stop();
  else if (panel) openPanel("");
}

function connectControls() {
  const click = (id, act) => find(id).addEventListener("click", act);
  const input = find("input");
  input.addEventListener("input", () => fit(input));
  input.addEventListener("keydown", (event) => sends(event) && submit(event));
  find("composer").addEventListener("submit", submit);
  find("model").addEventListener("change", draw);
  find("scroll").addEventListener("scroll", () => hideTip(find("tip")));
  find("file").addEventListener("change", async ({ target }) => {
    await importFile(target.files[0]);
    target.value = "";
  });
  click("stop", stop);
  click("new", () => startNew());
  click("import", () => find("file").click());
  click("export", () => conversations.exportFile([current]));
  click("export-all", () => conversations.exportFile(sorted()));
  click("open-list", () => openPanel("list"));
  click("open-settings", () => openPanel(document.body.dataset.panel ? "" : "settings"));
  for (const id of ["close-list", "close-settings", "backdrop"]) click(id, () => openPanel(""));
  document.addEventListener("keydown", (event) => event.key === "Escape" && escape());
  addEventListener("pagehide", leave);
}

// ------------------------------------------------------------------------------------ start

async function start() {
  conversations.loadConversations();
  conversations.followOtherTabs(takeChange);
  connectControls();
  connectSettings();
  connectTip(find("log"), find("tip"), () => settings.tints, branch);
  if (sorted().length) show(sorted()[0]);
  else startNew();
  models = await listModels();
  find("model").replaceChildren(...models.map(({ id }) => new Option(id)));
  if (current.messages.length) draw();
  else startNew();
}

start();
