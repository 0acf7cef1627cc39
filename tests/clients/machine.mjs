// A program without a user on the TypeScript SDK: it gets its tokens with a client id and a secret.
//
//     node machine.mjs v1|v2 URL
//
// MACHINE_ID and MACHINE_SECRET are its credentials. For every line on standard input it calls a tool, and writes what
// the tool answered.

import { createInterface } from 'node:readline';

const [version, url] = process.argv.slice(2);
const { Client, StreamableHTTPClientTransport, ClientCredentialsProvider } = await sdk(version);

async function sdk(name) {
  if (name === 'v2') return import('@modelcontextprotocol/client');
  return {
    ...(await import('@modelcontextprotocol/sdk/client/index.js')),
    ...(await import('@modelcontextprotocol/sdk/client/streamableHttp.js')),
    ...(await import('@modelcontextprotocol/sdk/client/auth-extensions.js')),
  };
}

const authProvider = new ClientCredentialsProvider({
  clientId: process.env.MACHINE_ID,
  clientSecret: process.env.MACHINE_SECRET,
  expectedIssuer: new URL('/', url).href,
});
const client = new Client({ name: 'machine', version: '1' });
await client.connect(new StreamableHTTPClientTransport(new URL(url), { authProvider }));

for await (const _ of createInterface({ input: process.stdin })) {
  const result = await client.callTool({ name: 'read_page', arguments: { title: 'Home' } });
  console.log(result.content[0].text);
}
process.exit();
