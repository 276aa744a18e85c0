/** Server-sent events, parsed as their bytes arrive. */

/** What is unfinished: the bytes of a line, the lines of an event.
 * @typedef {{rest: Uint8Array, event: string, data: string[]}} StreamState */

/** @type {StreamState} */
export const STREAM_START = Object.freeze({ rest: new Uint8Array(), event: "", data: [] });

/**
 * Parse the next bytes of an event stream. A pure function: only whole lines are decoded, so a
 * chunk may end anywhere, even inside a character.
 * @param {StreamState} state @param {Uint8Array} bytes
 * @returns {{state: StreamState, events: {event: string, data: string}[]}}
 */
export function parseEvents(state, bytes) {
  const all = new Uint8Array([...state.rest, ...bytes]);
  // A carriage return at the very end may be the first half of a line break.
  const end = Math.max(all.lastIndexOf(10), all.lastIndexOf(13, -2)) + 1;
  const lines = new TextDecoder().decode(all.subarray(0, end)).split(/\r\n|\n|\r/).slice(0, -1);
  let { event, data } = state;
  const events = [];
  for (const line of lines) {
    const [, field, value] = /^([^:]*):? ?(.*)$/s.exec(line);
    if (field === "data") data = [...data, value];
    if (field === "event") event = value;
    if (line) continue;
    if (data.length) events.push({ event: event || "message", data: data.join("\n") });
    [event, data] = ["", []];
  }
  return { state: { rest: all.slice(end), event, data }, events };
}

/** Yield the events of a response as they arrive. @param {Response} response */
export async function* readEvents(response) {
  const reader = response.body.getReader();
  let state = STREAM_START;
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parsed = parseEvents(state, value);
    state = parsed.state;
    yield* parsed.events;
  }
}
