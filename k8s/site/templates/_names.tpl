{{/* What every object's name begins with. */}}
{{- define "site.fullname" -}}
{{- .Values.fullnameOverride | default .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* Where the app runs: beside the SuperNode, or in the executor's namespace. */}}
{{- define "site.appNamespace" -}}
{{- if include "site.podPerTask" . -}}
{{- .Values.app.executor.namespace -}}
{{- else -}}
{{- .Release.Namespace -}}
{{- end -}}
{{- end }}

{{/* Whether tasks run in pods of their own: a text, or none. */}}
{{- define "site.podPerTask" -}}
{{- if eq .Values.app.executor.type "kubernetes" }}yes{{ end -}}
{{- end }}

{{/* The labels that tell one component's pods from all others: (list $ "app"). They never change. */}}
{{- define "site.selector" -}}
{{ include "site.allPods" (index . 0) }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* The labels that tell the release's pods from all others. Task pods are labelled by Flower. */}}
{{- define "site.allPods" -}}
app.kubernetes.io/name: vlafleet-site
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{/* The labels that the Kubernetes executor's task pods are known by. */}}
{{- define "site.taskPods" -}}
app.kubernetes.io/component: taskexecutor
vlafleet.dev/site: {{ include "site.fullname" . }}
{{- end }}

{{/* The labels of one component's pods: (list $ "app"). */}}
{{- define "site.podLabels" -}}
{{ include "site.selector" . }}
app.kubernetes.io/part-of: vlafleet
{{- with (index . 0).Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The labels of one component's objects: (list $ "app"). */}}
{{- define "site.labels" -}}
{{- $root := index . 0 -}}
{{ include "site.podLabels" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* An image's reference: (list $ .Values.app.image). */}}
{{- define "site.image" -}}
{{- $root := index . 0 -}}
{{- $image := index . 1 -}}
{{- with $root.Values.imageRegistry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- $image.repository -}}
{{- if $image.digest -}}
@{{ $image.digest }}
{{- else -}}
:{{ $image.tag | default $root.Chart.AppVersion }}
{{- end -}}
{{- end }}

{{/* The Secrets with the site's identities: the SuperNode's, and the SuperExec's. */}}
{{- define "site.identitySecret" -}}
{{- .Values.identity.existingSecret | default (printf "%s-identity" (include "site.fullname" .)) -}}
{{- end }}

{{- define "site.superexecSecret" -}}
{{- .Values.identity.superexecSecret | default (printf "%s-superexec" (include "site.fullname" .)) -}}
{{- end }}

{{/* A volume's claim: (list $ "state" .Values.app.persistence.state). */}}
{{- define "site.claimName" -}}
{{- $claim := index . 2 -}}
{{- $claim.existingClaim | default (printf "%s-%s" (include "site.fullname" (index . 0)) (index . 1)) -}}
{{- end }}

{{/* The port of host:port. */}}
{{- define "site.port" -}}
{{- regexFind "[0-9]+$" . -}}
{{- end }}

{{/* What the site trains on, as its SuperNode tells the ClientApp. */}}
{{- define "site.dataset" -}}
/data{{ with .Values.dataset.episodes }}#episodes={{ . }}{{ end }}
{{- end }}

{{- define "site.device" -}}
{{- if .Values.app.gpu.count }}cuda{{ else }}cpu{{ end -}}
{{- end }}

{{/* Whether something has to be fetched from the hub: a text, or none. */}}
{{- define "site.fetches" -}}
{{- if or .Values.app.models .Values.dataset.hub }}yes{{ end -}}
{{- end }}
