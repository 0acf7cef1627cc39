// A real OpenID Connect provider, with its own sign-in form: any name and password will do.
//
//     node openid.mjs PORT CLIENT_ID CLIENT_SECRET REDIRECT_URI
//
// It prints its issuer when it listens. PORT 0 is any. Everybody has the address NAME@example.com, which is verified
// unless the name is "imposter": that one says to be ada@example.com. ada is in the group "family".

import { createServer } from 'node:http';
import Provider from 'oidc-provider';

const [port, client_id, client_secret, redirectUri] = process.argv.slice(2);
const server = createServer();

server.listen(Number(port), '127.0.0.1', () => {
  const issuer = `http://127.0.0.1:${server.address().port}`;
  const provider = new Provider(issuer, {
    clients: [{ client_id, client_secret, redirect_uris: [redirectUri] }],
    claims: { openid: ['sub'], email: ['email', 'email_verified'], groups: ['groups'] },
    cookies: { keys: ['of the tests'] },
    pkce: { required: () => true },
    findAccount: (_, sub) => ({
      accountId: sub,
      claims: () => ({
        sub,
        email: `${sub === 'imposter' ? 'ada' : sub}@example.com`,
        email_verified: sub !== 'imposter',
        groups: sub === 'ada' ? ['family'] : [],
      }),
    }),
  });
  server.on('request', provider.callback());
  console.log(issuer);
});
