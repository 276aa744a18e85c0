/** Requests, and what is shown while the server is loading, is busy or asks for a key. */

import { PREFIX } from "./conversations.js";

const KEY = `${PREFIX}key`; // in the storage of the tab only

const QUEUE_MILLISECONDS = 1500;

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

/** Say in the status line what is being waited for. */
export function say(text) {
  const status = document.getElementById("status");
  if (status.textContent !== text) status.textContent = text;
}

async function request(path, options) {
  const key = sessionStorage.getItem(KEY);
  const headers = { "Content-Type": "application/json" };
  if (key) headers.Authorization = `Bearer ${key}`;
  try {
    return await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
}

const STATES = {
  loading: "The model is loading",
  stopping: "The server is stopping",
  failed: "The model has stopped working",
};

/** Return the Error that a refused request is reported with; its `code` is the server's. */
async function problemOf(response) {
  const { error, status } = await response.json().catch(() => ({}));
  const message = String(error?.message ?? STATES[status] ?? `the status is ${response.status}`);
  const sentence = message[0].toUpperCase() + message.slice(1);
  return Object.assign(new Error(sentence), { code: error?.code });
}

/**
 * Request until the server accepts: wait as long as it asks to, or for a missing key. Throws an
 * Error with the server's message. `sent` is when the accepted request was sent.
 * @returns {Promise<{response: Response, sent: number}>}
 */
async function requestUntilAccepted(path, options = {}) {
  for (;;) {
    const sent = performance.now();
    const response = await request(path, options);
    if (response.ok) return { response, sent };
    const problem = await problemOf(response);
    const seconds = Number(response.headers.get("Retry-After"));
    if (response.status === 401) await askForKey();
    else if (seconds > 0) await countDown(problem, seconds, options.signal);
    else throw problem;
  }
}

async function countDown(problem, seconds, signal) {
  const reason = problem.message.replace(/(; try again later)?\.?$/, "");
  for (let left = seconds; left > 0; left--) {
    say(`${reason}. Trying again in ${left} s.`);
    await pause(1000);
    signal?.throwIfAborted();
  }
  say("");
}

function askForKey() {
  const dialog = document.getElementById("key");
  const input = document.getElementById("key-value");
  input.value = dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    dialog.addEventListener("close", () => {
      if (dialog.returnValue !== "save") reject(new Error("The server asks for an API key."));
      else sessionStorage.setItem(KEY, input.value);
      resolve();
    }, { once: true });
  });
}

/** POST a body as JSON. */
export const post = (path, body, signal) =>
  requestUntilAccepted(path, { method: "POST", body: JSON.stringify(body), signal });

/** Say how long the queue is, until the function that is returned is called. */
export function watchQueue() {
  let waiting = true;
  const timer = setInterval(async () => {
    const response = await request("/health").catch(() => null);
    const { queued } = response?.ok ? await response.json() : {};
    if (waiting) say(queued ? `Waiting for a place: ${queued} in the queue.` : "");
  }, QUEUE_MILLISECONDS);
  return () => {
    if (waiting) say("");
    waiting = false;
    clearInterval(timer);
  };
}

/** Return the ids of `{prompt}` or `{messages}`. @returns {Promise<number[]>} */
export async function tokenize(model, content, signal) {
  const { response } = await post("/tokenize", { model, ...content }, signal);
  return (await response.json()).tokens;
}

/** Wait until the server is ready, then return its models. */
export async function listModels() {
  for (;;) {
    try {
      await requestUntilAccepted("/health");
      const { response } = await requestUntilAccepted("/v1/models");
      const models = (await response.json()).data;
      say("");
      return models;
    } catch (error) {
      say(error.message);
      await pause(3000);
    }
  }
}
