{{/* Where the identities of the processes come from. */}}

{{/* authority: this release's enrolment service signs them; secrets: they are given; issuer: cert-manager signs them. */}}
{{- define "superlink.source" -}}
{{- if .Values.certificates.issuerRef.name -}}
issuer
{{- else if compact (values .Values.certificates.existingSecrets) -}}
secrets
{{- else -}}
authority
{{- end -}}
{{- end -}}

{{/* The Secret of a holder: (list $ "superexec"). */}}
{{- define "superlink.secret" -}}
{{- $ := index . 0 -}}
{{- $holder := index . 1 -}}
{{- get $.Values.certificates.existingSecrets $holder | default (printf "%s-%s" (include "superlink.fullname" $) $holder) -}}
{{- end -}}

{{/* Role and name, as certificates bear them, of the holders of the Secrets. */}}
{{- define "superlink.holders" -}}
superlink: superlink/superlink
superexec: superexec/superlink
exporter: exporter/exporter
operator: operator/admin
monitor: monitor/prometheus
{{- end -}}

{{/*
The volume with the Secret of a holder: (list $ "superlink" "superlink-secret"). Where nothing renews itself it is the
identity, to which the revocation list comes.
*/}}
{{- define "superlink.secretVolume" -}}
{{- $ := index . 0 -}}
{{- $holder := index . 1 -}}
{{- $secret := include "superlink.secret" (list $ $holder) -}}
- name: {{ index . 2 }}
  {{- if eq (include "superlink.source" $) "authority" }}
  secret:
    secretName: {{ $secret | quote }}
    defaultMode: 0440
  {{- else }}
  projected:
    defaultMode: 0440
    sources:
      - secret:
          name: {{ $secret | quote }}
          items:
            - {key: tls.key, path: tls.key}
            - {key: tls.crt, path: tls.crt}
            - {key: ca.crt, path: ca.crt}
      {{- if ne $holder "superexec" }}
      - secret:
          name: {{ $.Values.certificates.revocationList.existingSecret | quote }}
          items:
            - {key: crl.pem, path: crl.pem}
      {{- end }}
  {{- end }}
{{- end -}}

{{/*
The init container that takes a Secret into the pod's volume: (list $ $image "identity" "secret" "/data/identity" ""),
image, name, volume, identity and prefix of the writable places; a server's has its role as well. After a change of its
addresses it fails until the enrolment service's pod has stored a certificate that names them.
*/}}
{{- define "superlink.takeContainer" -}}
{{- $ := index . 0 -}}
- name: {{ index . 2 }}
  {{- include "superlink.container" (list $ (index . 1)) | nindent 2 }}
  args:
    - certs
    - take
    - /secret
    - {{ index . 4 }}
    {{- if eq (len .) 7 }}
    {{- range include "superlink.hosts" (list $ (index . 6)) | fromJsonArray }}
    - --host
    - {{ . | quote }}
    {{- end }}
    {{- end }}
  env:
    {{- include "superlink.env" $ | nindent 4 }}
  volumeMounts:
    - name: {{ index . 3 }}
      mountPath: /secret
      readOnly: true
    - name: data
      mountPath: /data
    {{- include "superlink.scratchMounts" (index . 5) | nindent 4 }}
  {{- include "superlink.shortResources" $ | nindent 2 }}
{{- end -}}
