{{/* What every object's name begins with. */}}
{{- define "site.fullname" -}}
{{- .Values.fullnameOverride | default .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- end }}

{{/* Where the app runs: beside the SuperNode, or in the executor's namespace. */}}
{{- define "site.appNamespace" -}}
{{- if eq .Values.app.executor.type "kubernetes" -}}
{{- .Values.app.executor.namespace -}}
{{- else -}}
{{- .Release.Namespace -}}
{{- end -}}
{{- end }}

{{/* The labels that tell one component's pods from all others: (list $ "app"). They never change. */}}
{{- define "site.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: vlafleet-site
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* The labels of one component's pods: (list $ "app"). */}}
{{- define "site.podLabels" -}}
{{- $root := index . 0 -}}
{{ include "site.selector" . }}
app.kubernetes.io/part-of: vlafleet
{{- with $root.Values.commonLabels }}
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

{{/* What the site trains on, as its SuperNode tells the ClientApp. */}}
{{- define "site.dataset" -}}
/data{{ with .Values.dataset.episodes }}#episodes={{ . }}{{ end }}
{{- end }}

{{- define "site.device" -}}
{{- if .Values.app.gpu.count }}cuda{{ else }}cpu{{ end -}}
{{- end }}

{{/* The Secrets with the site's identities: the SuperNode's, and the SuperExec's. */}}
{{- define "site.identitySecret" -}}
{{- .Values.identity.existingSecret | default (printf "%s-identity" (include "site.fullname" .)) -}}
{{- end }}

{{- define "site.superexecSecret" -}}
{{- .Values.identity.superexecSecret | default (printf "%s-superexec" (include "site.fullname" .)) -}}
{{- end }}

{{/* The names of the volumes' claims. */}}
{{- define "site.supernodeClaim" -}}
{{- .Values.supernode.persistence.existingClaim | default (printf "%s-supernode" (include "site.fullname" .)) -}}
{{- end }}

{{- define "site.stateClaim" -}}
{{- .Values.app.persistence.state.existingClaim | default (printf "%s-state" (include "site.fullname" .)) -}}
{{- end }}

{{- define "site.cacheClaim" -}}
{{- .Values.app.persistence.cache.existingClaim | default (printf "%s-cache" (include "site.fullname" .)) -}}
{{- end }}
