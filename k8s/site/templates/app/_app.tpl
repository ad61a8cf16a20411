{{/* What the process that trains gets: its environment, resources, mounts and volumes. */}}

{{- define "site.appEnvironment" -}}
- name: VLAFLEET_LOG_FORMAT
  value: {{ .Values.logFormat }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- if .Values.app.gpu.count }}
- name: NVIDIA_DRIVER_CAPABILITIES
  value: compute,utility
{{- end }}
{{- end }}

{{/* With the GPUs, or the parts of one, among the limits. */}}
{{- define "site.appResources" -}}
{{- $resources := deepCopy .Values.app.resources -}}
{{- with .Values.app.gpu -}}
{{- if .count -}}
{{- $_ := set $resources "limits" (merge (dict .resource .count) ($resources.limits | default dict)) -}}
{{- end -}}
{{- end -}}
{{ toYaml $resources }}
{{- end }}

{{- define "site.appMounts" -}}
# What training keeps between rounds: the last model, optimiser moments, error feedback.
- {name: data, mountPath: /var/lib/vlafleet/sites, subPath: sites}
# What the frozen VLM makes of the site's frames, where memory is too small for it.
- {name: cache, mountPath: /var/lib/vlafleet/cache}
- name: dataset
  mountPath: /data
  readOnly: true
  {{- with .Values.dataset.subPath }}
  subPath: {{ . | quote }}
  {{- end }}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /home/vlafleet}
{{- end }}

{{- define "site.appVolumes" -}}
- name: data
  persistentVolumeClaim:
    claimName: {{ include "site.stateClaim" . }}
- name: cache
  persistentVolumeClaim:
    claimName: {{ include "site.cacheClaim" . }}
- name: dataset
  # Read-only as a volume, too: its files keep their owners and modes.
  persistentVolumeClaim:
    claimName: {{ .Values.dataset.existingClaim }}
    readOnly: true
{{ include "site.scratch" (list "512Mi" "2Gi") }}
{{- end }}
