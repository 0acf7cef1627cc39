// An MCP client application on the TypeScript SDK: what it knows stands in a JSON file, as in a real one.
//
//     node client.mjs v1|v2 URL STATE_FILE AUTH_METHOD [METADATA_DOCUMENT_URL]
//
// For every line "call" on standard input it calls a tool, for "list" it lists the tools, and writes one line of JSON:
// what the tool answered, or the names of the tools, the OAuth
// requests that it took, and how often a person would have had to go through a browser.

import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { createInterface } from 'node:readline';

const [version, url, stateFile, method, document] = process.argv.slice(2);
const { Client, StreamableHTTPClientTransport, UnauthorizedError } = await sdk(version);

async function sdk(name) {
  if (name === 'v2') return import('@modelcontextprotocol/client');
  const { Client } = await import('@modelcontextprotocol/sdk/client/index.js');
  const { StreamableHTTPClientTransport } = await import('@modelcontextprotocol/sdk/client/streamableHttp.js');
  const { UnauthorizedError } = await import('@modelcontextprotocol/sdk/client/auth.js');
  return { Client, StreamableHTTPClientTransport, UnauthorizedError };
}

let requests = [];
let authorizations = 0;
let callback;

// Note a request that belongs to OAuth, and how the client authenticated.
function saw(requestMethod, target, init, status) {
  const { pathname } = new URL(target);
  if (pathname === new URL(url).pathname && status !== 401) return;
  let what = `${requestMethod} ${pathname}`;
  if (pathname.endsWith('/token')) {
    const form = new URLSearchParams(String(init.body));
    const basic = new Headers(init.headers).get('authorization')?.startsWith('Basic ');
    const how = basic ? 'client_secret_basic' : form.has('client_secret') ? 'client_secret_post' : 'none';
    what += ` (${form.get('grant_type')}, ${how})`;
  }
  requests.push(`${what} ${status}`);
}

async function watchedFetch(target, init = {}) {
  const response = await fetch(target, init);
  saw(init.method ?? 'GET', target, init, response.status);
  return response;
}

// What a client application stores. Each read is from the file: nothing lives in the process alone.
const stored = {
  read: () => (existsSync(stateFile) ? JSON.parse(readFileSync(stateFile, 'utf8')) : {}),
  get: name => stored.read()[name],
  set: (name, value) => writeFileSync(stateFile, JSON.stringify({ ...stored.read(), [name]: value })),
};

const provider = {
  redirectUrl: 'http://127.0.0.1:9/callback',
  clientMetadata: {
    client_name: `TypeScript SDK ${version}`,
    redirect_uris: ['http://127.0.0.1:9/callback'],
    grant_types: ['authorization_code', 'refresh_token'],
    response_types: ['code'],
    token_endpoint_auth_method: method,
  },
  clientMetadataUrl: document,
  state: () => 'the-state',
  clientInformation: () => stored.get('client'),
  saveClientInformation: value => stored.set('client', value),
  tokens: () => stored.get('tokens'),
  saveTokens: value => stored.set('tokens', value),
  codeVerifier: () => stored.get('verifier'),
  saveCodeVerifier: value => stored.set('verifier', value),
  discoveryState: () => stored.get('discovery'),
  saveDiscoveryState: value => stored.set('discovery', value),
  invalidateCredentials(scope) {
    for (const name of scope === 'all' ? ['client', 'tokens', 'verifier', 'discovery'] : [scope]) {
      stored.set(name, undefined);
    }
  },
  // A person with a browser, up to the redirect back to the client.
  async redirectToAuthorization(authorizationUrl) {
    authorizations += 1;
    const browser = process.env.OWNER ? process.env.OWNER + encodeURIComponent(authorizationUrl) : authorizationUrl;
    const response = await fetch(browser, { redirect: 'manual' });
    saw('GET', authorizationUrl, {}, response.status);
    const location = response.headers.get('location');
    if (!location?.startsWith(provider.redirectUrl)) throw new Error(`/authorize answered ${response.status}`);
    callback = new URL(location).searchParams;
    if (callback.get('state') !== 'the-state') throw new Error('/authorize did not return the state');
  },
};

let client;

async function connect() {
  const transport = new StreamableHTTPClientTransport(new URL(url), { authProvider: provider, fetch: watchedFetch });
  const connecting = new Client({ name: 'test', version: '1' });
  await connecting.connect(transport);
  client = connecting;
}

// Do `step`; where it takes a person, finish what the person began, and do it once more.
async function authorized(step) {
  try {
    return await step();
  } catch (error) {
    if (!(error instanceof UnauthorizedError) || !callback) throw error;
    const transport = new StreamableHTTPClientTransport(new URL(url), { authProvider: provider, fetch: watchedFetch });
    // v2 takes all parameters, and checks `iss` (RFC 9207)
    await transport.finishAuth(version === 'v2' ? callback : callback.get('code'));
    callback = undefined;
    return step();
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  [requests, authorizations] = [[], 0];
  const result = await authorized(async () => {
    if (!client) await connect();
    if (line === 'list') return client.listTools();
    return client.callTool({ name: 'read_page', arguments: { title: 'Home' } });
  });
  const answer = result.tools?.map(tool => tool.name).join(' ') ?? result.content[0].text;
  console.log(JSON.stringify({ answer, requests, authorizations }));
}
await client?.close();
process.exit(0);
